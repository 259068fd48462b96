// A folder of its own for the files of a test, in $TMPDIR or else in the current folder: /tmp is often a tmpfs, which has no O_DIRECT.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

using bytes = std::vector<unsigned char>;

class temp_folder {
  public:
    temp_folder() {
        const char * base = getenv("TMPDIR");
        std::string  name = std::string(base != nullptr && *base != '\0' ? base : ".") + "/hobbit-test-XXXXXX";
        if (mkdtemp(&name[0]) == nullptr) {
            throw std::runtime_error("cannot make the folder " + name);
        }
        path_ = name;
    }

    ~temp_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    temp_folder(const temp_folder &)             = delete;
    temp_folder & operator=(const temp_folder &) = delete;

    std::string path(const std::string & name) const { return path_ + "/" + name; }

  private:
    std::string path_;
};

inline bytes read_all(const std::string & path) {
    FILE * f = fopen(path.c_str(), "rb");
    if (f == nullptr) {
        throw std::runtime_error("cannot open " + path);
    }
    bytes out((size_t) std::filesystem::file_size(path));
    if (fread(out.data(), 1, out.size(), f) != out.size()) {
        out.clear();
    }
    fclose(f);
    return out;
}

// `mode`: "wb" makes the file anew, "r+b" writes into the one that others have open.
inline void write_all(const std::string & path, const bytes & content, const char * mode = "wb") {
    FILE *     f  = fopen(path.c_str(), mode);
    const bool ok = f != nullptr && (content.empty() || fwrite(content.data(), 1, content.size(), f) == content.size());
    if (f == nullptr || fclose(f) != 0 || !ok) {
        throw std::runtime_error("cannot write " + path);
    }
}

// The byte at `i` of a content called `seed`: neighbours and contents differ.
inline unsigned char byte_at(uint32_t seed, uint64_t i) {
    uint64_t x = (i + 1) * 0x9E3779B97F4A7C15ull ^ (uint64_t) (seed + 1) * 0xBF58476D1CE4E5B9ull;
    return (unsigned char) ((x ^ (x >> 29)) * 0x94D049BB133111EBull >> 56);
}

inline bytes content(uint32_t seed, uint64_t n) {
    bytes out(n);
    for (uint64_t i = 0; i < n; ++i) {
        out[i] = byte_at(seed, i);
    }
    return out;
}

}  // namespace test
