// One expert's product with the batch rows routed to it: by which kernel, in which pieces. Whose turn it is: mul-mat-id.cpp.
#pragma once

#include "../engine/layer-pass.h"
#include "repacking.h"
#include "tile.h"

#include "ggml-cpu.h"

// upstream, private
#include "ggml-cpu-impl.h"

namespace hobbit {

// Of so many batch rows an expert on, a product is bound by computing; below by memory, which likes one stream.
constexpr int64_t MANY_ROWS = 4;

// One source type: a slice of one expert seen as a tensor of a single expert, and src1 in the type its kernel wants.
struct operand {
    bool                  used = false;
    ggml_tensor           weights;                   // ne[2] = 1, data set per expert
    ggml_tensor           result;                    // dst with src[0] = &weights
    const char *          rows          = nullptr;   // src1 rows in vec_dot_type
    size_t                row_stride[2] = { 0, 0 };  // bytes along i11, i12
    ggml_vec_dot_t        vec_dot       = nullptr;
    const repack_kernel * repacked      = nullptr;  // instead of vec_dot, where the slices are repacked
    const tile_kernel *   tiles         = nullptr;  // beside vec_dot or repacked, for MANY_ROWS and more
};

inline ggml_type kernel_type(int32_t type) { return ggml_get_type_traits_cpu((ggml_type) type)->vec_dot_type; }

// The slice of `op->src[0]` at another type, as ggml sees a tensor.
void make_operand(operand & o, const ggml_tensor * op, const tensor_source & source);

// src1 -> `to`, in the type of the kernel, all threads together: a stripe of every row each, as ggml does it.
void convert_rows(const ggml_compute_params * params, const ggml_tensor * src1, ggml_type type, char * to);

// Rows [r0, r1) of the expert's matrix times the batch rows [c0, c1) of its list. For a repacked slice r0 and r1 are multiples of the
// kernel's columns.
void multiply(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0, int64_t r1,
              int64_t c0, int64_t c1);

// How an expert's product with `n_rows` batch rows is cut into pieces of a size that suits the caches.
struct cut {
    int64_t rows, cols;  // of a piece
    int64_t n_row_pieces;
    int32_t n;

    cut(const operand & o, int64_t n_rows, int nth);
};

}  // namespace hobbit
