// Quantising to IQ4_NL: what upstream's quantiser looks for, several times as fast, and further: see iq4-nl.cpp.
#pragma once

#include <cstdint>

namespace hobbit {

// As ggml_quantize_chunk: `n_rows` rows of `n_per_row` floats, a multiple of 32, into blocks of 18 bytes; imatrix: the importance of each
// column, finite and not below 0, or NULL; of a block without any, all columns count alike. The floats are finite and fit F16.
void quantize_iq4_nl(const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * imatrix);

}  // namespace hobbit
