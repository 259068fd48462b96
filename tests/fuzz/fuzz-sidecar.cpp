// Any bytes as the low-precision copies of a good model.
#include "../cpp/tiny-gguf.h"
#include "fuzz-file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const test::temp_folder folder;
    static const std::string       model = [] {
        test::tiny_model m;
        m.n_layer = 2, m.n_expert = 4, m.low = false;
        m.write(folder.path("model.gguf"));
        return folder.path("model.gguf");
    }();
    fuzz::open_index(model, fuzz::memory_file(data, size).path());
    return 0;
}
