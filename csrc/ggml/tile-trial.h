// Whether a tile kernel gives the bits of another product on this CPU.
#pragma once

#include "tile.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace hobbit {

// The product that it is compared with, of TRIAL_LENGTH weights a row.
struct trial_product {
    int64_t                          n_r;      // rows of weights
    std::function<void(std::byte *)> arrange;  // quantised rows -> the operand of both; may be empty
    // out[0 .. n_r) = the rows times one row of inputs.
    std::function<void(const std::byte * weights, const char * x, float * out)> multiply;
};

constexpr int64_t TRIAL_LENGTH = 512;

// Tried with some random numbers.
bool has_bits_of(const trial_product & product, const tile_kernel & kernel);

// Of each type the first of `kernels` that passes, or NULL.
std::map<int32_t, const tile_kernel *> first_with_bits(const std::vector<tile_kernel> &                 kernels,
                                                       const std::function<bool(const tile_kernel &)> & passes);

}  // namespace hobbit
