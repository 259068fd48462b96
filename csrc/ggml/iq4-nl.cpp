// A weight of a block is scale x one of sixteen values. As upstream's quantize_row_iq4_nl_impl: scales that put the largest weight at or
// near an end of the values are tried, for each the best scale of the values so chosen follows by least squares, and the one of the least
// squared error stays, each column's times its importance. Other than upstream's:
// - An error counts alike whatever the weight is (there by the weight's square, with an importance matrix by about its size). With this
//   and the next, the low copies of a model of 30 layers lost 14 % less (KL divergence, three selections of four low), with an importance
//   matrix and without.
// - The largest weight is put near either end, not near the longer one alone.
// - The value of a weight is found by comparing with all fifteen limits between values, eight weights at a time, not by bisection.
#include "iq4-nl.h"

#include "ggml.h"

// upstream, private: the blocks, then the tables
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"

#include <cmath>
#include <initializer_list>

namespace hobbit {

namespace {

constexpr int BLOCK = QK4_NL, N_VALUES = 16, LANES = 8;
constexpr int STEPS = 7;  // to either side of an end

// GCC's and Clang's vectors, on any CPU.
using floats = float __attribute__((vector_size(LANES * sizeof(float))));
using ints   = int32_t __attribute__((vector_size(LANES * sizeof(float))));

// What is added from one value to the next where a weight, in units of the scale, is beyond the middle between them.
struct limits {
    float at[N_VALUES - 1], step[N_VALUES - 1];

    limits() {
        for (int i = 0; i + 1 < N_VALUES; ++i) {
            at[i]   = (float) (kvalues_iq4nl[i] + kvalues_iq4nl[i + 1]) / 2;
            step[i] = (float) (kvalues_iq4nl[i + 1] - kvalues_iq4nl[i]);
        }
    }
};

const limits LIMITS;

floats nearest_value(floats x) {
    floats q = (float) kvalues_iq4nl[0] - floats {};
    for (int i = 0; i + 1 < N_VALUES; ++i) {
        q += (floats) ((x >= LIMITS.at[i]) & (ints) (LIMITS.step[i] - floats {}));
    }
    return q;
}

struct block {
    floats x[BLOCK / LANES], w[BLOCK / LANES];
};

float sum_of(floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) {
        sum += x[i];
    }
    return sum;
}

// The sums of w q x and w q q over the block, q the value nearest to x times `inverse`.
struct fit {
    float qx, qq;

    fit(const block & b, float inverse) {
        floats qxs = {}, qqs = {};
        for (int i = 0; i < BLOCK / LANES; ++i) {
            const floats q = nearest_value(b.x[i] * inverse);
            qxs += b.w[i] * q * b.x[i];
            qqs += b.w[i] * q * q;
        }
        qx = sum_of(qxs);
        qq = sum_of(qqs);
    }
};

// In steps of two to either side of both ends, then of one about the best of these.
float best_scale(const block & b, float largest) {
    float      scale = 0, best = 0, place = 0;  // best: what of the weighted squares is explained
    const auto look = [&](float largest_at) {
        const fit   at(b, largest_at / largest);
        const float explained = at.qq > 0 ? at.qx / at.qq * at.qx : 0;
        if (explained > best) {
            best  = explained;
            scale = at.qx / at.qq;
            place = largest_at;
        }
    };
    for (const int end : { kvalues_iq4nl[0], kvalues_iq4nl[N_VALUES - 1] }) {
        for (int step = -STEPS; step <= STEPS; step += 2) {
            look((float) (end + step));
        }
    }
    const float middle = place;
    look(middle - 1);
    look(middle + 1);
    return scale;
}

void quantize_block(const float * x, const float * importance, block_iq4_nl & to) {
    float sum = 0, largest = 0;
    for (int j = 0; importance != nullptr && j < BLOCK; ++j) {
        sum += importance[j];
    }
    block b;
    for (int j = 0; j < BLOCK; ++j) {
        largest                   = std::fabs(x[j]) > std::fabs(largest) ? x[j] : largest;
        b.x[j / LANES][j % LANES] = x[j];
        b.w[j / LANES][j % LANES] = sum > 0 ? importance[j] : 1;
    }
    // Of smaller weights the scale is 0 in half precision.
    to.d                     = ggml_fp32_to_fp16(std::fabs(largest) < 1e-7f ? 0 : best_scale(b, largest));
    const float scale        = ggml_fp16_to_fp32(to.d);
    const float inverse      = scale != 0 ? 1 / scale : 0;
    uint8_t     index[BLOCK] = {};
    for (int j = 0; j < BLOCK; ++j) {
        for (const float limit : LIMITS.at) {
            index[j] += x[j] * inverse >= limit ? 1 : 0;
        }
    }
    for (int j = 0; j < BLOCK / 2; ++j) {
        to.qs[j] = (uint8_t) (index[j] | index[j + BLOCK / 2] << 4);
    }
}

}  // namespace

void quantize_iq4_nl(const float * src, void * dst, int64_t n_rows, int64_t n_per_row, const float * imatrix) {
    auto * to = (block_iq4_nl *) dst;
    for (int64_t row = 0; row < n_rows; ++row) {
        for (int64_t i = 0; i < n_per_row; i += BLOCK, src += BLOCK, ++to) {
            quantize_block(src, imatrix != nullptr ? imatrix + i : nullptr, *to);
        }
    }
}

}  // namespace hobbit
