// The input of a fuzz target as a file with a path: in memory, nothing is written to a disk.
#pragma once

#include "base/error.h"
#include "io/expert-index.h"

#include "ggml.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace fuzz {

class memory_file {
  public:
    memory_file(const uint8_t * data, size_t size) : fd_(memfd_create("fuzz", MFD_CLOEXEC)) {
        if (fd_ < 0 || (size > 0 && write(fd_, data, size) != (ssize_t) size)) {
            abort();
        }
    }

    ~memory_file() { close(fd_); }

    memory_file(const memory_file &)             = delete;
    memory_file & operator=(const memory_file &) = delete;

    std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

  private:
    int fd_;
};

inline void quiet() {
    static const bool once = (ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr), true);
    (void) once;
}

// What holds for every index that was accepted: all extents lie in their file, slots have room for them.
inline void check(const hobbit::expert_index & index) {
    const auto require = [](bool ok, const char * what) {
        if (!ok) {
            fprintf(stderr, "accepted, but not true: %s\n", what);
            abort();
        }
    };
    require(!index.layers().empty(), "there are layers");
    require(index.n_expert_used >= 1 && index.n_expert_used <= index.n_expert, "k <= n_expert");
    for (const auto & layer : index.layers()) {
        require(!layer.projections.empty(), "there are projections");
        for (const auto & proj : layer.projections) {
            require(index.find(proj.name).first >= 0, "a tensor is found by its name");
            for (int p = 0; p < hobbit::N_PRECISION; ++p) {
                const auto & src = proj.source[p];
                if (src.type < 0) {
                    require(p == 1, "high precision is there");
                    continue;
                }
                require(src.slice > 0 && src.row_bytes > 0, "a slice has bytes");
                for (const uint32_t e : { 0u, layer.n_expert - 1 }) {
                    const auto x = src.expert(e);
                    require(x.bytes <= index.source(x.file).size() && x.offset <= index.source(x.file).size() - x.bytes,
                            "a slice lies in its file");
                    require(x.bytes <= proj.slot_bytes[p], "a slot has room for a slice");
                }
            }
        }
    }
    index.tensor_pattern();
}

// Opens and checks; what a user would be told is fine, anything else is a finding.
inline void open_index(const std::string & path, const std::string & low_path) {
    quiet();
    try {
        check(hobbit::expert_index(path, low_path, false));
    } catch (const hobbit::error & e) {
        if (e.status() == HOBBIT_ERR_INTERNAL) {
            abort();
        }
    }
}

}  // namespace fuzz
