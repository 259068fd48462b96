#include "operand.h"

#include <algorithm>
#include <cstring>

namespace hobbit {

static constexpr int64_t TILE_ROWS = 16;
static constexpr int64_t CACHED    = 256 << 10;  // bytes of weights: a half or a quarter of usual second-level caches

void make_operand(operand & o, const ggml_tensor * op, const tensor_source & source) {
    o.weights        = *op->src[0];
    o.weights.type   = (ggml_type) source.type;
    o.weights.extra  = nullptr;
    o.weights.buffer = nullptr;
    o.weights.ne[2]  = 1;
    o.weights.nb[0]  = ggml_type_size(o.weights.type);
    o.weights.nb[1]  = source.row_bytes;
    o.weights.nb[2]  = source.slice;
    o.weights.nb[3]  = source.slice;
    o.result         = *op;
    o.result.src[0]  = &o.weights;
    o.vec_dot        = ggml_get_type_traits_cpu(o.weights.type)->vec_dot;
    o.tiles          = find_tile_kernel(source.type, o.weights.ne[0]);
}

void convert_rows(const ggml_compute_params * params, const ggml_tensor * src1, ggml_type type, char * to) {
    const auto    from_float = ggml_get_type_traits_cpu(type)->from_float;
    const int64_t block      = ggml_blck_size(type);
    const size_t  row        = ggml_row_size(type, src1->ne[0]);
    const int64_t begin      = (params->ith * src1->ne[0] / block) / params->nth;
    const int64_t end        = ((params->ith + 1) * src1->ne[0] / block) / params->nth;
    for (int64_t i12 = 0; i12 < src1->ne[2]; ++i12) {
        for (int64_t i11 = 0; i11 < src1->ne[1]; ++i11) {
            const auto * x = (const float *) ((const char *) src1->data + i12 * src1->nb[2] + i11 * src1->nb[1]);
            from_float(x + begin * block, to + (i12 * src1->ne[1] + i11) * row + begin * ggml_type_size(type),
                       (end - begin) * block);
        }
    }
}

// The row of inputs of a place in the batch, and the row of results.
static const char * input_of(const operand & o, const ggml_tensor * dst, pass_row at) {
    return o.rows + (at.slot % dst->src[1]->ne[1]) * o.row_stride[0] + at.token * o.row_stride[1];
}

static float * output_of(ggml_tensor * dst, pass_row at) {
    return (float *) ((char *) dst->data + at.slot * dst->nb[1] + at.token * dst->nb[2]);
}

static void multiply_block(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0,
                           int64_t r1, int64_t c0, int64_t c1) {
    const int64_t ne00 = o.weights.ne[0];
    const size_t  nb01 = o.weights.nb[1];
    float         tmp[16];
    for (int64_t cc = c0; cc < c1; cc += 16) {
        for (int64_t rr = r0; rr < r1; rr += 16) {
            const int64_t r_end = std::min(rr + 16, r1);
            for (int64_t c = cc; c < std::min(cc + 16, c1); ++c) {
                const char * x   = input_of(o, dst, rows[c]);
                float *      out = output_of(dst, rows[c]);
                for (int64_t r = rr; r < r_end; ++r) {
                    o.vec_dot((int) ne00, &tmp[r - rr], 0, slice + r * nb01, 0, x, 0, 1);
                }
                memcpy(out + rr, tmp, (r_end - rr) * sizeof(float));
            }
        }
    }
}

// At most TILE_ROWS batch rows at a time.
static void multiply_tiles(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0,
                           int64_t r1, int64_t c0, int64_t c1) {
    thread_local std::vector<std::byte> room;

    const int64_t n = o.weights.ne[0];
    room.resize(o.tiles->prepared_bytes(n, TILE_ROWS) + 64);
    auto * inputs = (std::byte *) align_up((size_t) room.data(), 64);
    for (int64_t c = c0; c < c1; c += TILE_ROWS) {
        const int64_t n_c = std::min(TILE_ROWS, c1 - c);
        const char *  x[TILE_ROWS];
        float *       out[TILE_ROWS];
        for (int64_t i = 0; i < n_c; ++i) {
            x[i]   = input_of(o, dst, rows[c + i]);
            out[i] = output_of(dst, rows[c + i]) + r0;
        }
        o.tiles->prepare(x, n, n_c, inputs);
        o.tiles->multiply(n, slice + r0 * o.weights.nb[1], o.weights.nb[1], r1 - r0, inputs, n_c, out);
    }
}

// As ggml does it, one batch row at a time.
static void multiply_repacked(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0,
                              int64_t r1, int64_t c0, int64_t c1) {
    const char * w = slice + r0 * o.weights.nb[1];
    for (int64_t c = c0; c < c1; ++c) {
        o.repacked->gemv((int) o.weights.ne[0], output_of(dst, rows[c]) + r0, (size_t) o.weights.ne[1], w,
                         input_of(o, dst, rows[c]), 1, (int) (r1 - r0));
    }
}

void multiply(const operand & o, ggml_tensor * dst, const char * slice, const pass_row * rows, int64_t r0, int64_t r1,
              int64_t c0, int64_t c1) {
    const auto how = o.tiles != nullptr && c1 - c0 >= MANY_ROWS ? multiply_tiles
                     : o.repacked != nullptr                    ? multiply_repacked
                                                                : multiply_block;
    how(o, dst, slice, rows, r0, r1, c0, c1);
}

static int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

cut::cut(const operand & o, int64_t n_rows, int nth) {
    const int64_t n_out = o.weights.ne[1];
    int64_t       n0    = 0;  // pieces of the rows of weights
    if (o.tiles != nullptr && n_rows >= MANY_ROWS) {
        n0 = std::min<int64_t>(parts(n_out, 16), 2 * nth);  // few, since each prepares its inputs for itself
        // No rest of a few batch rows, which would go one by one.
        cols = n_rows % TILE_ROWS < MANY_ROWS ? parts(n_rows, parts(n_rows, TILE_ROWS)) : TILE_ROWS;
    } else if (o.repacked != nullptr && n_rows > 1) {
        // All batch rows go by a piece one after the other, as long as it stays in a core's own cache.
        n0   = std::max<int64_t>(nth, parts(n_out * (int64_t) o.weights.nb[1], CACHED));
        cols = n_rows;
    } else {  // ggml's rule
        const int64_t size = n_out == 1 || n_rows == 1 ? 64 : 16;
        int64_t       n1   = parts(n_rows, size);
        n0                 = parts(n_out, size);
        if (n0 * n1 < nth * 4) {
            n0 = n_out > n_rows ? nth : 1;
            n1 = n_out > n_rows ? 1 : nth;
        }
        cols = parts(n_rows, n1);
    }
    const int64_t together = o.repacked == nullptr ? 1 : o.repacked->columns;
    rows                   = parts(parts(n_out, n0), together) * together;
    n_row_pieces           = parts(n_out, rows);
    n                      = (int32_t) (n_row_pieces * parts(n_rows, cols));
}

}  // namespace hobbit
