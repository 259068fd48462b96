// ggml/error-feedback.h: less is lost in what inputs see, row by row the same, and without anything in common between columns as before.
#include "ggml/error-feedback.h"

#include "test.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <random>
#include <vector>

namespace {

constexpr int64_t N = 512, N_ROWS = 70;  // columns: two blocks of the largest; rows: more than go together, and no multiple

using numbers = std::vector<float>;
using bytes   = std::vector<char>;

struct type_of_blocks {
    ggml_type           type;
    hobbit::block_shape shape;

    explicit type_of_blocks(ggml_type t) : type(t), shape { ggml_blck_size(t), (int64_t) ggml_type_size(t), 65504.0f } {
        ggml_quantize_init(t);
    }

    void operator()(const float * src, void * dst, float * back, int64_t n_rows, const float * importance) const {
        ggml_quantize_chunk(type, src, dst, 0, n_rows, shape.columns, importance);
        ggml_get_type_traits(type)->to_float(dst, back, n_rows * shape.columns);
    }
};

bytes with_feedback(const type_of_blocks & type, const numbers & w, const numbers & factor) {
    bytes out(ggml_row_size(type.type, (int64_t) w.size()));
    hobbit::quantize_with_feedback(type.shape, type, w.data(), out.data(), (int64_t) w.size() / N, N, factor.data());
    return out;
}

// A block at a time: ggml looks at the whole row to say how much a large weight counts.
bytes without(const type_of_blocks & type, const numbers & w, const numbers & importance) {
    bytes   out(ggml_row_size(type.type, (int64_t) w.size()));
    numbers back(type.shape.columns);
    for (int64_t at = 0; at < (int64_t) w.size(); at += type.shape.columns) {
        type(w.data() + at, out.data() + at / type.shape.columns * type.shape.bytes, back.data(), 1,
             importance.data() + at % N);
    }
    return out;
}

// |e R|^2 over all rows: the mean square of what products of the inputs are off by.
double lost(const type_of_blocks & type, const numbers & w, const bytes & q, const numbers & factor) {
    numbers back(w.size());
    ggml_get_type_traits(type.type)->to_float(q.data(), back.data(), (int64_t) back.size());
    double sum = 0;
    for (size_t row = 0; row < w.size() / N; ++row) {
        for (int64_t j = 0; j < N; ++j) {
            double off = 0;
            for (int64_t i = 0; i <= j; ++i) {
                off += (w[row * N + i] - back[row * N + i]) * factor[i * N + j];
            }
            sum += off * off;
        }
    }
    return sum;
}

numbers weights(uint32_t seed) {
    std::mt19937                    random(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    numbers                         w(N * N_ROWS);
    std::generate(w.begin(), w.end(), [&] { return normal(random); });
    return w;
}

// Of second moments like those of activations: a few directions that all columns are in, by `common`, beside what each has of its own.
numbers factor_of(double common) {
    constexpr int                    N_DIRECTIONS = 40;
    std::mt19937                     random(5);
    std::normal_distribution<double> normal;
    std::vector<double>              directions(N * N_DIRECTIONS), h(N * N), r(N * N);
    std::generate(directions.begin(), directions.end(), [&] { return common * normal(random); });
    for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = 0; j < N; ++j) {
            for (int k = 0; k < N_DIRECTIONS; ++k) {
                h[i * N + j] += directions[i * N_DIRECTIONS + k] * directions[j * N_DIRECTIONS + k];
            }
        }
        h[i * N + i] += 0.5 + std::fabs(normal(random));
    }
    // Cholesky's, from the last column on: h = r r^T, r upper triangular
    for (int64_t j = N - 1; j >= 0; --j) {
        for (int64_t i = j; i >= 0; --i) {
            double sum = h[i * N + j];
            for (int64_t k = j + 1; k < N; ++k) {
                sum -= r[i * N + k] * r[j * N + k];
            }
            r[i * N + j] = i == j ? std::sqrt(sum) : sum / r[j * N + j];
        }
    }
    return numbers(r.begin(), r.end());
}

// How much each column counts within its block.
numbers diagonal_of_moments(const type_of_blocks & type, const numbers & factor) {
    numbers d(N);
    for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = i; j < (i / type.shape.columns + 1) * type.shape.columns; ++j) {
            d[i] += factor[i * N + j] * factor[i * N + j];
        }
    }
    return d;
}

const ggml_type TYPES[] = { GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_0, GGML_TYPE_Q3_K, GGML_TYPE_Q2_K, GGML_TYPE_IQ2_XXS };

}  // namespace

TEST("less is lost than by the same quantiser that knows only how much each column counts") {
    const numbers w = weights(1), factor = factor_of(0.3);
    for (const ggml_type t : TYPES) {
        const type_of_blocks type(t);
        const double         before = lost(type, w, without(type, w, diagonal_of_moments(type, factor)), factor);
        // with blocks of 256 only the second of two can make good anything
        CHECK(lost(type, w, with_feedback(type, w, factor), factor) < (type.shape.columns == 32 ? 0.45 : 0.7) * before);
    }
}

TEST("columns with nothing in common: as without") {
    const numbers w = weights(2), factor = factor_of(0);
    for (const ggml_type t : TYPES) {
        const type_of_blocks type(t);
        CHECK(with_feedback(type, w, factor) == without(type, w, diagonal_of_moments(type, factor)));
    }
}

TEST("what is wanted of a block is its weights and what the ones before it owe") {
    const type_of_blocks type(GGML_TYPE_IQ4_NL);
    const numbers        w = weights(3), factor = factor_of(0.3), importance = diagonal_of_moments(type, factor);
    const bytes          q = with_feedback(type, w, factor);
    numbers              back(w.size());
    ggml_get_type_traits(type.type)->to_float(q.data(), back.data(), (int64_t) back.size());
    const int64_t n = type.shape.columns, last = N - n;
    for (const int64_t row : { (int64_t) 0, (int64_t) 33, N_ROWS - 1 }) {
        // s R_BB = sum of e_A R_AB, from the first column on
        std::vector<double> owed(n);
        numbers             wanted(n), again(n);
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < last; ++i) {
                sum += (double) (w[row * N + i] - back[row * N + i]) * factor[i * N + last + j];
            }
            for (int64_t i = 0; i < j; ++i) {
                sum -= owed[i] * factor[(last + i) * N + last + j];
            }
            owed[j]   = sum / factor[(last + j) * N + last + j];
            wanted[j] = (float) (w[row * N + last + j] + owed[j]);
        }
        bytes of(type.shape.bytes);
        type(wanted.data(), of.data(), again.data(), 1, importance.data() + last);
        for (int64_t j = 0; j < n; ++j) {
            CHECK(std::fabs(again[j] - back[row * N + last + j]) < 1e-4f);
        }
    }
}

TEST("a row comes out the same whatever rows it is quantised with") {
    const type_of_blocks type(GGML_TYPE_IQ4_NL);
    const numbers        w = weights(4), factor = factor_of(0.3);
    const bytes          all    = with_feedback(type, w, factor);
    const size_t         row    = all.size() / N_ROWS;
    const int64_t        cuts[] = { 0, 1, 3, 40, N_ROWS };
    for (size_t i = 0; i + 1 < std::size(cuts); ++i) {
        const numbers some(w.begin() + cuts[i] * N, w.begin() + cuts[i + 1] * N);
        CHECK(with_feedback(type, some, factor) == bytes(all.begin() + cuts[i] * row, all.begin() + cuts[i + 1] * row));
    }
}

TEST("zeros at the beginning of a row do not keep it from feedback") {
    const type_of_blocks type(GGML_TYPE_IQ4_NL);
    const numbers        factor = factor_of(0.3);
    numbers              w      = weights(7);
    for (int64_t row = 0; row < N_ROWS; ++row) {
        std::fill_n(w.begin() + row * N, 64, 0.0f);
    }
    const double before = lost(type, w, without(type, w, diagonal_of_moments(type, factor)), factor);
    CHECK(lost(type, w, with_feedback(type, w, factor), factor) < 0.5 * before);
}

TEST("where what is owed outgrows the weights, nearest values") {
    const type_of_blocks type(GGML_TYPE_IQ4_NL);
    const numbers        w      = weights(6);
    numbers              factor = factor_of(0);
    for (const float together : { 1e3f, 1e12f, 1e15f }) {
        for (int64_t i = 0; i < N; ++i) {
            std::fill(factor.begin() + i * N + i + 1, factor.begin() + (i + 1) * N, together);
        }
        CHECK(with_feedback(type, w, factor) == without(type, w, diagonal_of_moments(type, factor)));
    }
}

TEST_MAIN()
