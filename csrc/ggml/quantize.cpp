#include "quantize.h"

#include "../base/error.h"
#include "error-feedback.h"
#include "iq4-nl.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace hobbit {

namespace {

// Removed types keep their number and a row in ggml's table, with a block of 0.
bool known_type(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_get_type_traits((ggml_type) type)->blck_size > 0;
}

// The cases of ggml_quantize_chunk, which has no way to say no.
bool can_quantize(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
            return true;
        // meant for activations only
        case GGML_TYPE_Q8_1:
        case GGML_TYPE_Q8_K:
            return false;
        default:
            return ggml_get_type_traits(type)->is_quantized;
    }
}

// Largest magnitude that survives: most types keep either their values or the scale of a block as F16.
float max_magnitude(ggml_type type) { return type == GGML_TYPE_F32 || type == GGML_TYPE_BF16 ? FLT_MAX : 65504.0f; }

// Of a Cholesky factor: sums of squares of a row stay finite, those of its diagonal above zero, on which ggml's quantisers insist.
constexpr float LEAST_FACTOR = 1e-15f, LARGEST_FACTOR = 1e15f;

// Index of the first value that is NaN, infinite or too large; -1 when there is none. The maximum over short runs is what the
// compiler vectorises; `!(x <= limit)` is true for NaN.
int64_t find_unusable(const float * src, int64_t n, float limit) {
    const int64_t run = 4096;
    for (int64_t begin = 0; begin < n; begin += run) {
        const int64_t end = begin + run < n ? begin + run : n;
        int           bad = 0;
        for (int64_t i = begin; i < end; i++) {
            bad |= !(std::fabs(src[i]) <= limit);
        }
        for (int64_t i = begin; bad != 0 && i < end; i++) {
            if (!(std::fabs(src[i]) <= limit)) {
                return i;
            }
        }
    }
    return -1;
}

ggml_type check_type(int32_t type) {
    if (!known_type(type)) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, format("type %d is not a ggml type", type));
    }
    return (ggml_type) type;
}

// The checks of all that quantises. False: there is nothing to do.
bool check_rows(int32_t type_id, const float * src, const void * dst, int64_t n_rows, int64_t n_per_row,
                bool with_importance) {
    const ggml_type type  = check_type(type_id);
    const char *    name  = ggml_type_name(type);
    const int64_t   block = ggml_blck_size(type);

    if (!can_quantize(type)) {
        fail(HOBBIT_ERR_UNSUPPORTED, format("ggml has no quantiser for %s", name));
    }
    if (n_rows < 0 || n_per_row <= 0 || (n_rows > 0 && n_per_row > INT64_MAX / 8 / n_rows)) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT,
             format("n_rows = %lld, n_per_row = %lld: out of range", (long long) n_rows, (long long) n_per_row));
    }
    if (n_per_row % block != 0) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, format("n_per_row = %lld is not a multiple of the %lld elements of a %s block",
                                                 (long long) n_per_row, (long long) block, name));
    }
    if (n_rows == 0) {
        return false;
    }
    if (src == nullptr || dst == nullptr) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, "src and dst must not be NULL");
    }
    if (!with_importance && ggml_quantize_requires_imatrix(type)) {
        fail(HOBBIT_ERR_UNSUPPORTED, format("%s needs an importance matrix", name));
    }
    const int64_t bad = find_unusable(src, n_rows * n_per_row, max_magnitude(type));
    if (bad >= 0) {
        fail(HOBBIT_ERR_FORMAT,
             format("row %lld, column %lld holds %g, which %s cannot represent", (long long) (bad / n_per_row),
                    (long long) (bad % n_per_row), (double) src[bad], name));
    }
    return true;
}

// What was checked.
void quantize_rows(ggml_type type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * imatrix) {
    if (type == GGML_TYPE_IQ4_NL) {
        quantize_iq4_nl(src, dst, n_rows, n_per_row, imatrix);
        return;
    }
    const size_t written = ggml_quantize_chunk(type, src, dst, 0, n_rows, n_per_row, imatrix);
    if (written != (size_t) n_rows * ggml_row_size(type, n_per_row)) {
        fail(HOBBIT_ERR_INTERNAL, format("ggml wrote %zu bytes of %s", written, ggml_type_name(type)));
    }
}

}  // namespace

void quantize(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * imatrix) {
    if (check_rows(type, src, dst, n_rows, n_per_row, imatrix != nullptr)) {
        quantize_rows((ggml_type) type, src, dst, n_rows, n_per_row, imatrix);
    }
}

void dequantize(int32_t type_id, const void * src, float * dst, int64_t n) {
    const ggml_type          type   = check_type(type_id);
    const ggml_type_traits * traits = ggml_get_type_traits(type);

    if (type != GGML_TYPE_F32 && traits->to_float == nullptr) {
        fail(HOBBIT_ERR_UNSUPPORTED, format("ggml cannot turn %s into floats", traits->type_name));
    }
    if (n < 0 || n % traits->blck_size != 0) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, format("n = %lld is not a multiple of the %lld elements of a %s block",
                                                 (long long) n, (long long) traits->blck_size, traits->type_name));
    }
    if (n == 0) {
        return;
    }
    if (src == nullptr || dst == nullptr) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, "src and dst must not be NULL");
    }
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, (size_t) n * sizeof(float));
    } else {
        traits->to_float(src, dst, n);
    }
}

void quantize_feedback(int32_t type_id, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                       const float * factor) {
    if (!check_rows(type_id, src, dst, n_rows, n_per_row, true)) {
        return;
    }
    const ggml_type          type   = (ggml_type) type_id;
    const ggml_type_traits * traits = ggml_get_type_traits(type);
    if (factor == nullptr) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, "factor must not be NULL");
    }
    for (int64_t i = 0; i < n_per_row; ++i) {
        if (!(factor[i * n_per_row + i] >= LEAST_FACTOR) ||
            find_unusable(factor + i * n_per_row, n_per_row, LARGEST_FACTOR) >= 0) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT,
                 format("row %lld of the factor is not that of a Cholesky factor", (long long) i));
        }
    }
    const int64_t         n    = traits->blck_size;
    const block_quantizer each = [&](const float * rows, void * bytes, float * back, int64_t n_of,
                                     const float * importance) {
        quantize_rows(type, rows, bytes, n_of, n, importance);
        dequantize(type, bytes, back, n_of * n);
    };
    quantize_with_feedback({ n, (int64_t) traits->type_size, max_magnitude(type) }, each, src, dst, n_rows, n_per_row,
                           factor);
}

bool type_facts(int32_t type, hobbit_type_info & out) {
    if (!known_type(type)) {
        return false;
    }
    const auto t      = (ggml_type) type;
    out.name          = ggml_type_name(t);
    out.block         = (uint32_t) ggml_blck_size(t);
    out.block_bytes   = (uint32_t) ggml_type_size(t);
    out.needs_imatrix = ggml_quantize_requires_imatrix(t);
    out.computable    = ggml_get_type_traits_cpu(t)->vec_dot != nullptr;
    return true;
}

void prepare_quantizer(int32_t type) {
    if (known_type(type)) {
        ggml_quantize_init((ggml_type) type);
    }
}

}  // namespace hobbit
