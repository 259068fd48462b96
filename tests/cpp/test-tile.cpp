// ggml/tile.h: each kernel that was built gives the bits of upstream's product of two rows.
#include "ggml/tile.h"

#include "test.h"

#include "ggml-cpu.h"
#include "ggml.h"

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

TEST_MAIN()
