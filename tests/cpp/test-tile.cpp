// ggml/tile.h: each kernel that was built gives the bits of upstream's product of two rows, or of eight repacked rows by one.
#include "ggml/tile.h"

#include "ggml/repacking.h"

#include "test.h"

#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace {

// Rows of any bytes; `least`: of each byte of quants. Scales are finite: +-2^-14 to 2.
std::vector<char> random_rows(ggml_type type, int64_t n, int64_t n_rows, int least, std::mt19937 & random) {
    std::vector<char> rows(ggml_row_size(type, n) * (size_t) n_rows);
    char *            to = rows.data();
    for (int64_t b = 0; b < n / ggml_blck_size(type) * n_rows; ++b) {
        const auto scale = (uint16_t) (0x0400 + random() % 0x3c00 + (random() % 2 << 15));
        memcpy(to, &scale, sizeof(scale));
        to += sizeof(scale);
        for (size_t i = sizeof(scale); i < ggml_type_size(type); ++i) {
            *to++ = (char) std::uniform_int_distribution<int>(least, 127)(random);
        }
    }
    return rows;
}

std::vector<std::byte> random_bytes(size_t n, std::mt19937 & random) {
    std::vector<std::byte> out(n);
    for (std::byte & b : out) {
        b = (std::byte) random();
    }
    return out;
}

template <typename block_t>
void set_scales(std::vector<std::byte> & rows, std::mt19937 & random) {
    for (size_t at = 0; at < rows.size(); at += sizeof(block_t)) {
        auto & block = ((block_t *) &rows[at])->GGML_COMMON_AGGR_U.GGML_COMMON_AGGR_S;
        block.d      = (ggml_half) (0x0400 + random() % 0x3c00 + (random() % 2 << 15));
        block.dmin   = (ggml_half) (0x0400 + random() % 0x3c00 + (random() % 2 << 15));
    }
}

// Largest quants in every fourth row, where sums of 16 bits are at their limits.
std::vector<block_q8_K> random_inputs(int64_t n, int64_t n_rows, std::mt19937 & random) {
    std::vector<block_q8_K> rows((size_t) (n / QK_K * n_rows));
    for (size_t i = 0; i < rows.size(); ++i) {
        block_q8_K & x = rows[i];
        x.d            = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
        for (int k = 0; k < QK_K; ++k) {
            x.qs[k] =
                (int8_t) (i / (size_t) (n / QK_K) % 4 == 3 ? -127 : std::uniform_int_distribution<int>(-127, 127)(random));
        }
        for (int s = 0; s < QK_K / 16; ++s) {
            x.bsums[s] = 0;
            for (int k = 0; k < 16; ++k) {
                x.bsums[s] = (int16_t) (x.bsums[s] + x.qs[s * 16 + k]);
            }
        }
    }
    return rows;
}

bool same_bits_as_gemv(const hobbit::tile_kernel & kernel, int64_t n, int64_t n_r, int64_t n_c, std::mt19937 & random) {
    const hobbit::repack_kernel * repacked = hobbit::find_repack_kernel(kernel.type, n, n_r);
    if (repacked == nullptr) {
        return false;
    }
    const size_t           w_row = ggml_row_size((ggml_type) kernel.type, n);
    std::vector<std::byte> w     = random_bytes(w_row * (size_t) n_r, random);
    kernel.type == GGML_TYPE_Q4_K ? set_scales<block_q4_K>(w, random) : set_scales<block_q2_K>(w, random);
    hobbit::repack_slice(*repacked, n, n_r, w.data());
    const std::vector<block_q8_K> x = random_inputs(n, n_c, random);

    std::vector<const char *> inputs;
    std::vector<float>        tiled((size_t) ((n_r + 1) * n_c), -1.0f), plain = tiled;
    std::vector<float *>      out;
    for (int64_t c = 0; c < n_c; ++c) {
        inputs.push_back((const char *) &x[(size_t) (c * n / QK_K)]);
        out.push_back(&tiled[(size_t) (c * (n_r + 1))]);
        repacked->gemv((int) n, &plain[(size_t) (c * (n_r + 1))], (size_t) n_r, w.data(), inputs.back(), 1, (int) n_r);
    }
    std::vector<std::byte> room(kernel.prepared_bytes(n, n_c) + 64);
    auto *                 prepared = (std::byte *) (((uintptr_t) room.data() + 63) / 64 * 64);
    kernel.prepare(inputs.data(), n, n_c, prepared);
    kernel.multiply(n, (const char *) w.data(), w_row, n_r, prepared, n_c, out.data());
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

// Of n_c inputs to n_r rows: nothing is written beyond.
bool same_bits(const hobbit::tile_kernel & kernel, int64_t n, int64_t n_r, int64_t n_c, std::mt19937 & random) {
    const auto              type    = (ggml_type) kernel.type;
    const auto              vec_dot = ggml_get_type_traits_cpu(type)->vec_dot;
    const size_t            w_row   = ggml_row_size(type, n);
    const size_t            x_row   = ggml_row_size(GGML_TYPE_Q8_0, n);
    const std::vector<char> w       = random_rows(type, n, n_r, -128, random);
    const std::vector<char> x       = random_rows(GGML_TYPE_Q8_0, n, n_c, -127, random);  // quantising gives no -128

    std::vector<const char *> inputs;
    std::vector<float>        tiled((size_t) ((n_r + 1) * n_c), -1.0f), plain = tiled;
    std::vector<float *>      out;
    for (int64_t c = 0; c < n_c; ++c) {
        inputs.push_back(&x[(size_t) c * x_row]);
        out.push_back(&tiled[(size_t) (c * (n_r + 1))]);
        for (int64_t r = 0; r < n_r; ++r) {
            vec_dot((int) n, &plain[(size_t) (c * (n_r + 1) + r)], 0, &w[(size_t) r * w_row], 0, inputs.back(), 0, 1);
        }
    }
    std::vector<std::byte> room(kernel.prepared_bytes(n, n_c) + 64);
    auto *                 prepared = (std::byte *) (((uintptr_t) room.data() + 63) / 64 * 64);
    kernel.prepare(inputs.data(), n, n_c, prepared);
    kernel.multiply(n, w.data(), w_row, n_r, prepared, n_c, out.data());
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

}  // namespace

TEST("a tile has the bits of the product of two rows, at every width") {
    ggml_cpu_init();
    std::mt19937 random(11);
    for (const hobbit::tile_kernel & kernel : hobbit::tile_kernels()) {
        for (int64_t n : { kernel.multiple, 3 * kernel.multiple, (int64_t) 768 }) {
            for (int64_t n_r : { 1, 4, 7, 24 }) {
                for (int64_t n_c = 1; n_c <= 17; ++n_c) {
                    CHECK(same_bits(kernel, n, n_r, n_c, random));
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

TEST("a tile of repacked rows has the bits of gemv, at every width") {
    ggml_cpu_init();
    std::mt19937 random(12);
    for (const hobbit::tile_kernel & kernel : hobbit::repacked_tile_kernels()) {
        for (int64_t n : { kernel.multiple, 3 * kernel.multiple }) {
            for (int64_t n_r : { 8, 40 }) {
                for (int64_t n_c : { 1, 2, 3, 4, 5, 8, 15, 16, 17, 33 }) {
                    CHECK(same_bits_as_gemv(kernel, n, n_r, n_c, random));
                }
            }
        }
    }
}

TEST("there are kernels for repacked Q4_K and Q2_K where upstream has AVX2, and for no other type") {
    for (const ggml_type type : { GGML_TYPE_Q4_K, GGML_TYPE_Q2_K, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4 }) {
        const hobbit::repack_kernel * repacked = hobbit::find_repack_kernel(type, 256, 8);
        if (repacked != nullptr && ggml_cpu_has_avx2()) {
            const hobbit::tile_kernel * found = hobbit::find_repacked_tile_kernel(*repacked);
            CHECK_EQ(found != nullptr, type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q2_K);
        }
    }
}

TEST_MAIN()
