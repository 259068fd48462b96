// ggml's public quantisers behind checks, and our own of IQ4_NL. See the quantisation section of hobbit.h.
//
// ggml asserts on what it cannot do: a row that its block does not divide, a missing importance matrix, a NaN in an IQ type. An
// assertion ends the process, so all of this is refused here first.
#pragma once

#include "../hobbit.h"

namespace hobbit {

// False for an unknown type.
bool type_facts(int32_t type, hobbit_type_info & out);

// Before quantize() from several threads.
void prepare_quantizer(int32_t type);

// These throw HOBBIT_ERR_INVALID_ARGUMENT and HOBBIT_ERR_UNSUPPORTED.
void quantize(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * imatrix);
void quantize_feedback(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * factor);
void dequantize(int32_t type, const void * src, float * dst, int64_t n);

}  // namespace hobbit
