// Experts times the rows of a batch: several rows of the matrix by several of the batch at a time, so that what is loaded and unpacked once
// serves many products. One row of a batch gains nothing while decoding.
//
// For Q8_0, Q4_0 and IQ4_NL as they are stored upstream has the product of two rows alone (its tiled kernels take K- and I-quants), and for
// experts that are repacked that of eight rows by one. The same numbers are added in the same order as by these, so the result has the same
// bits for finite inputs:
// - as stored: a block of 32 is summed in integers to eight parts, which times the product of both scales are added to eight running sums
//   (IQ4_NL: sixteen);
// - repacked Q4_0, IQ4_NL, MXFP4: it is summed to one integer, and there is one running sum;
// - repacked Q4_K, Q2_K: a super-block of 256 is, with one running sum for the quants and one for the minimums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hobbit {

struct tile_kernel {
    const char * name;
    int32_t      type;      // ggml_type of the weights; the inputs are its vec_dot_type
    int64_t      multiple;  // that the length of a row must be of
    // Bytes that prepare() fills for `n_c` rows of inputs, `n` long.
    size_t (*prepared_bytes)(int64_t n, int64_t n_c);
    // Rows of inputs -> the operand of multiply, aligned to 64 bytes.
    void (*prepare)(const char * const * rows, int64_t n, int64_t n_c, std::byte * to);
    // out[c][0 .. n_r) = n_r rows of weights, `row_bytes` apart, times row c of the inputs.
    void (*multiply)(int64_t n, const char * weights, size_t row_bytes, int64_t n_r, const std::byte * inputs, int64_t n_c,
                     float * const * out);
};

// Those that the library was built with, of each type the fastest first.
const std::vector<tile_kernel> & tile_kernels();

// For rows of `n` elements. NULL for a type that there is none for, for rows that upstream's product ends differently, where none was
// built, and where its bits are not those of upstream's product: tried on this CPU with some random numbers.
const tile_kernel * find_tile_kernel(int32_t type, int64_t n);

// The same for slices that are repacked: n_r is a multiple of eight.
const std::vector<tile_kernel> & repacked_tile_kernels();

// NULL where there is none for the type, and where its bits are not those of repack_kernel::gemv on this CPU.
const tile_kernel * find_repacked_tile_kernel(int32_t type);

}  // namespace hobbit
