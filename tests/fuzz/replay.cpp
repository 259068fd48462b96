// Runs a fuzz target over files, as an ordinary test: program FILE_OR_FOLDER...
#include "../cpp/temp-folder.h"

#include <cstdint>
#include <cstdio>
#include <filesystem>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

int main(int argc, char ** argv) {
    namespace fs   = std::filesystem;
    int        n   = 0;
    const auto run = [&n](const fs::path & path) {
        const test::bytes input = test::read_all(path.string());
        LLVMFuzzerTestOneInput(input.data(), input.size());
        n++;
    };
    for (int i = 1; i < argc; ++i) {
        if (!fs::is_directory(argv[i])) {
            run(argv[i]);
            continue;
        }
        for (const auto & entry : fs::directory_iterator(argv[i])) {
            run(entry.path());
        }
    }
    printf("%d inputs\n", n);
    return n == 0;
}
