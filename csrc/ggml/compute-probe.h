// How quickly this machine multiplies one token by weights of a type: the floor under every token once all weights are in memory.
#pragma once

#include <cstdint>

namespace hobbit {

// Bytes of weights a second in products of one token with [n_in, n_out] matrices of the type, one after the other as in a graph, by ggml's
// own kernels and in the layout that they are kept in here. Together the matrices are larger than the CPU's caches.
// Throws HOBBIT_ERR_INVALID_ARGUMENT for what cannot be multiplied, HOBBIT_ERR_NO_MEMORY.
double probe_compute(int32_t type, int64_t n_in, int64_t n_out, uint32_t n_threads, double seconds);

}  // namespace hobbit
