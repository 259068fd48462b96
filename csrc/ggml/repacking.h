// Expert slices in the interleaved layout that stock llama.cpp uses on this CPU.
//
// Stock llama.cpp keeps weights of some types repacked (eight rows interleaved) and multiplies them by kernels of their own, which
// add in another order than the plain ones. To give the same bits, high-precision slices of such types are repacked when they
// arrive, in place, on the reader thread: eight rows stay within the bytes that they had.
#pragma once

#include <cstddef>
#include <cstdint>

struct ggml_tensor;

namespace hobbit {

struct repack_kernel {
    int32_t type;     // ggml_type
    int64_t columns;  // rows of the matrix that are interleaved
    // s[0 .. nc) = the rows of vx (repacked, n long) times vy; nr = 1.
    void (*gemv)(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
    // `plain`, `columns` rows in `bytes` bytes -> group->data; 0 when done.
    int (*repack)(ggml_tensor * group, const void * plain, size_t bytes);
};

// NULL when stock llama.cpp multiplies [n_in, n_out] experts of this type as they are, here.
const repack_kernel * find_repack_kernel(int32_t type, int64_t n_in, int64_t n_out);

// `slice`: n_out rows of the type, plain -> repacked.
void repack_slice(const repack_kernel & kernel, int64_t n_in, int64_t n_out, std::byte * slice);

}  // namespace hobbit
