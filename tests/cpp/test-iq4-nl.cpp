// ggml/iq4-nl.h: better than upstream's quantiser, in the same format, and at the edges of half precision.
#include "ggml/iq4-nl.h"

#include "test.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

constexpr int64_t N = 96, N_ROWS = 200, BLOCK = 32;
constexpr size_t  BLOCK_BYTES = 18;

using numbers = std::vector<float>;
using bytes   = std::vector<char>;

bytes by_us(const numbers & x, const float * imatrix) {
    bytes out(x.size() / BLOCK * BLOCK_BYTES);
    hobbit::quantize_iq4_nl(x.data(), out.data(), (int64_t) x.size() / N, N, imatrix);
    return out;
}

numbers to_float(const bytes & q) {
    numbers out(q.size() / BLOCK_BYTES * BLOCK);
    ggml_get_type_traits(GGML_TYPE_IQ4_NL)->to_float(q.data(), out.data(), (int64_t) out.size());
    return out;
}

double error_of(const numbers & x, const bytes & q, const float * imatrix) {
    const numbers back = to_float(q);
    double        sum  = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        sum += (imatrix != nullptr ? imatrix[i % N] : 1) * std::pow(x[i] - back[i], 2);
    }
    return sum;
}

}  // namespace

TEST("a weighted error below that of upstream's quantiser") {
    std::mt19937                       random(3);
    std::normal_distribution<float>    normal;
    std::student_t_distribution<float> heavy(4);
    std::vector<numbers>               kinds(2, numbers(N * N_ROWS));
    std::generate(kinds[0].begin(), kinds[0].end(), [&] { return 0.02f * normal(random); });
    std::generate(kinds[1].begin(), kinds[1].end(), [&] { return 0.02f * heavy(random); });
    numbers imatrix(N);
    std::generate(imatrix.begin(), imatrix.end(), [&] { return std::exp(2 * normal(random)); });
    for (const numbers & x : kinds) {
        for (const float * importance : { (const float *) nullptr, (const float *) imatrix.data() }) {
            bytes upstream(x.size() / BLOCK * BLOCK_BYTES);
            ggml_quantize_chunk(GGML_TYPE_IQ4_NL, x.data(), upstream.data(), 0, N_ROWS, N, importance);
            CHECK(error_of(x, by_us(x, importance), importance) < 0.98 * error_of(x, upstream, importance));
        }
    }
}

TEST("what the type can hold stays as it is") {
    const float values[] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    for (const float scale : { 0.25f, -0.25f, 1.0f / 4096, 512.0f }) {
        numbers x;
        for (int64_t i = 0; i < N; ++i) {
            x.push_back(scale * values[i * 7 % 16]);
        }
        CHECK(to_float(by_us(x, nullptr)) == x);
    }
}

TEST("zeros, numbers too small for half precision, and the largest") {
    for (const float size : { 0.0f, 1e-40f, 1e-20f, 1e-8f }) {
        for (const float x : to_float(by_us(numbers(N, size), nullptr))) {
            CHECK_EQ(x, 0.0f);
        }
    }
    numbers x(N, 65504.0f), imatrix(N, 1e6f);
    x[1] = x[40]       = -65504.0f;
    const numbers back = to_float(by_us(x, imatrix.data()));
    for (size_t i = 0; i < x.size(); ++i) {
        CHECK(std::fabs(back[i] - x[i]) < 0.13f * 65504);  // one of the two signs has its end at 113 of 127
    }
}

TEST("columns of no importance do not count, and in a block without any all count alike") {
    numbers x(N, 0.01f), imatrix(N, 1.0f);
    for (int64_t i = 0; i < N; i += 3) {
        x[i] = -0.007f;
    }
    const numbers alike = to_float(by_us(x, nullptr));
    x[2]                = 0.03f;
    imatrix[2]          = 0;
    std::fill(imatrix.begin() + BLOCK, imatrix.begin() + 2 * BLOCK, 0.0f);
    const numbers back = to_float(by_us(x, imatrix.data()));
    for (int64_t i = 0; i < BLOCK; ++i) {
        CHECK(i == 2 || std::fabs(back[i] - x[i]) < 2e-4f);
    }
    CHECK(std::equal(back.begin() + BLOCK, back.end(), alike.begin() + BLOCK));
}

TEST_MAIN()
