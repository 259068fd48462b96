// ggml/tile.h: each kernel that was built gives the bits of upstream's product of two rows, or of eight repacked rows by one.
#include "ggml/tile.h"

#include "ggml/repacking.h"

#include "test.h"

#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace {

using bytes = std::vector<char>;

// Finite: +-2^-14 to 2.
uint16_t random_scale(std::mt19937 & random) { return (uint16_t) (0x0400 + random() % 0x3c00 + (random() % 2 << 15)); }

// Rows of any bytes but for the scales.
bytes random_weights(ggml_type type, int64_t n, int64_t n_rows, std::mt19937 & random) {
    bytes rows(ggml_row_size(type, n) * (size_t) n_rows);
    for (char & byte : rows) {
        byte = (char) random();
    }
    std::fill_n(rows.begin(), ggml_row_size(type, n), (char) 0xff);
    for (size_t at = 0; at < rows.size(); at += ggml_type_size(type)) {
        char * const block     = &rows[at];
        const auto   set_scale = [&](size_t where) {
            const uint16_t scale = random_scale(random);
            memcpy(block + where, &scale, sizeof(scale));
        };
        if (type == GGML_TYPE_MXFP4) {
            *block = (char) (random() % 4 == 0 ? random() % 3 : 112 + random() % 32);  // denormal too
            if (at == 0) {
                *block = (char) 0xff;  // no NaN for upstream
            }
        } else if (type == GGML_TYPE_Q2_K) {
            set_scale(sizeof(block_q2_K) - 4);
            set_scale(sizeof(block_q2_K) - 2);
        } else {
            set_scale(0);
            if (type == GGML_TYPE_Q4_K) {
                set_scale(2);
            }
        }
    }
    return rows;
}

// The largest quants there are in every fourth row, which by weights that are as large (below) bring sums of 16 bits to their limits.
// Quantising finite numbers gives no -128.
int8_t random_quant(int64_t row, std::mt19937 & random) {
    return (int8_t) (row % 8 == 3 ? -127 : row % 8 == 7 ? 127 : std::uniform_int_distribution<int>(-127, 127)(random));
}

bytes random_inputs(ggml_type type, int64_t n, int64_t n_rows, std::mt19937 & random) {
    bytes rows(ggml_row_size(type, n) * (size_t) n_rows);
    for (int64_t r = 0; r < n_rows; ++r) {
        char * const row = &rows[(size_t) r * ggml_row_size(type, n)];
        for (int64_t b = 0; b < n / ggml_blck_size(type); ++b) {
            if (type == GGML_TYPE_Q8_0) {
                block_q8_0 & x = ((block_q8_0 *) row)[b];
                x.d            = random_scale(random);
                for (int8_t & q : x.qs) {
                    q = random_quant(r, random);
                }
                continue;
            }
            block_q8_K & x = ((block_q8_K *) row)[b];
            x.d            = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
            for (int8_t & q : x.qs) {
                q = random_quant(r, random);
            }
            for (int s = 0; s < QK_K / 16; ++s) {
                x.bsums[s] = (int16_t) std::accumulate(x.qs + s * 16, x.qs + (s + 1) * 16, 0);
            }
        }
    }
    return rows;
}

// Of n_c inputs to n_r rows: nothing is written beyond. `multiply`: (inputs, out[0 .. n_r)).
template <typename multiply_t>
bool same_bits(const hobbit::tile_kernel & kernel, const bytes & w, int64_t n, int64_t n_r, int64_t n_c,
               std::mt19937 & random, const multiply_t & multiply) {
    const auto                x_type = ggml_get_type_traits_cpu((ggml_type) kernel.type)->vec_dot_type;
    const bytes               x      = random_inputs(x_type, n, n_c, random);
    std::vector<const char *> inputs;
    std::vector<float>        tiled((size_t) ((n_r + 1) * n_c), -1.0f), plain = tiled;
    std::vector<float *>      out;
    for (int64_t c = 0; c < n_c; ++c) {
        inputs.push_back(&x[(size_t) c * ggml_row_size(x_type, n)]);
        out.push_back(&tiled[(size_t) (c * (n_r + 1))]);
        multiply(inputs.back(), &plain[(size_t) (c * (n_r + 1))]);
    }
    std::vector<std::byte> room(kernel.prepared_bytes(n, n_c) + 64);
    auto *                 prepared = (std::byte *) (((uintptr_t) room.data() + 63) / 64 * 64);
    kernel.prepare(inputs.data(), n, n_c, prepared);
    kernel.multiply(n, w.data(), ggml_row_size((ggml_type) kernel.type, n), n_r, prepared, n_c, out.data());
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

const std::vector<ggml_type> REPACKED = { GGML_TYPE_Q4_K, GGML_TYPE_Q2_K, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL,
                                          GGML_TYPE_MXFP4 };

}  // namespace

TEST("a tile has the bits of the product of two rows, at every width") {
    ggml_cpu_init();
    std::mt19937 random(11);
    for (const hobbit::tile_kernel & kernel : hobbit::tile_kernels()) {
        const auto type = (ggml_type) kernel.type;
        for (int64_t n : { kernel.multiple, 3 * kernel.multiple, (int64_t) 768 }) {
            for (int64_t n_r : { 1, 4, 7, 24 }) {
                const bytes w        = random_weights(type, n, n_r, random);
                const auto  multiply = [&](const char * x, float * out) {
                    for (int64_t r = 0; r < n_r; ++r) {
                        const char * row = &w[(size_t) r * ggml_row_size(type, n)];
                        ggml_get_type_traits_cpu(type)->vec_dot((int) n, out + r, 0, row, 0, x, 0, 1);
                    }
                };
                for (int64_t n_c = 1; n_c <= 17; ++n_c) {
                    CHECK(same_bits(kernel, w, n, n_r, n_c, random, multiply));
                }
            }
        }
    }
}

TEST("a tile of repacked rows has the bits of gemv, at every width") {
    ggml_cpu_init();
    std::mt19937 random(12);
    for (const hobbit::tile_kernel & kernel : hobbit::repacked_tile_kernels()) {
        for (int64_t n : { kernel.multiple, 3 * kernel.multiple, (int64_t) 768 }) {
            for (int64_t n_r : { 8, 40 }) {
                const hobbit::repack_kernel * repacked = hobbit::find_repack_kernel(kernel.type, n, n_r);
                if (repacked == nullptr) {
                    continue;  // stock multiplies it as it is on this CPU
                }
                bytes w = random_weights((ggml_type) kernel.type, n, n_r, random);
                hobbit::repack_slice(*repacked, n, n_r, (std::byte *) w.data());
                const auto multiply = [&](const char * x, float * out) {
                    repacked->gemv((int) n, out, (size_t) n_r, w.data(), x, 1, (int) n_r);
                };
                for (int64_t n_c : { 1, 2, 3, 4, 5, 8, 15, 16, 17, 33 }) {
                    CHECK(same_bits(kernel, w, n, n_r, n_c, random, multiply));
                }
            }
        }
    }
}

TEST("there are kernels for Q8_0, Q4_0 and IQ4_NL where upstream has AVX2, and for no other type") {
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL }) {
        const hobbit::tile_kernel * found = hobbit::find_tile_kernel(type, 64);
        CHECK(found != nullptr ? found->type == type : !ggml_cpu_has_avx2());
    }
    CHECK(hobbit::find_tile_kernel(GGML_TYPE_Q4_1, 64) == nullptr);
    CHECK(hobbit::find_tile_kernel(-1, 64) == nullptr);
}

TEST("no kernel for rows that end within the blocks upstream takes at a time") {
    for (const hobbit::tile_kernel & kernel : hobbit::tile_kernels()) {
        const bool pairs = kernel.type == GGML_TYPE_IQ4_NL;  // of blocks
        for (int64_t n : { 32, 64, 96, 128 }) {
            CHECK_EQ(hobbit::find_tile_kernel(kernel.type, n) == nullptr, pairs && n % 64 != 0);
        }
    }
}

TEST("there is a kernel for every type that upstream repacks, and it is found") {
    ggml_cpu_init();
    for (const ggml_type type : REPACKED) {
        if (hobbit::find_repack_kernel(type, 256, 8) != nullptr) {
            const hobbit::tile_kernel * found = hobbit::find_repacked_tile_kernel(type);
            CHECK(found != nullptr ? found->type == type : !ggml_cpu_has_avx2());
        }
    }
}

TEST_MAIN()
