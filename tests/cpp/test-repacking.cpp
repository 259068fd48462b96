// ggml/repacking.h: slices come out of it as they come out of stock llama.cpp's repacking buffer.
#include "ggml/repacking.h"

#include "ggml/interleave.h"

#include "test.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#include "repack.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace {

// [n_in, n_out] experts in upstream's buffer: what one of them looks like there.
std::vector<std::byte> upstream_repacked(ggml_type type, int64_t n_in, int64_t n_out, const std::vector<std::byte> & plain) {
    ggml_context *        ctx = ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true });
    ggml_tensor *         w   = ggml_new_tensor_3d(ctx, type, n_in, n_out, 1);
    ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_repack_buffer_type());
    ggml_backend_tensor_set(w, plain.data(), 0, plain.size());
    const auto *                 data = (const std::byte *) w->data;
    const std::vector<std::byte> result(data, data + plain.size());
    ggml_backend_buffer_free(buf);
    ggml_free(ctx);
    return result;
}

}  // namespace

TEST("a slice is repacked to the bytes of upstream, whatever it holds") {
    ggml_cpu_init();
    std::mt19937 random(7);
    int          n_kernels = 0;
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q2_K, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4 }) {
        for (int64_t n_in : { 256, 768 }) {
            for (int64_t n_out : { 8, 72 }) {
                const hobbit::repack_kernel * kernel = hobbit::find_repack_kernel(type, n_in, n_out);
                if (kernel == nullptr) {
                    continue;  // stock multiplies it as it is on this CPU
                }
                ++n_kernels;
                std::vector<std::byte> slice(ggml_row_size(type, n_in) * n_out);
                for (std::byte & b : slice) {
                    b = (std::byte) random();
                }
                const std::vector<std::byte> expected = upstream_repacked(type, n_in, n_out, slice);
                hobbit::repack_slice(*kernel, n_in, n_out, slice.data());
                CHECK(slice == expected);
            }
        }
    }
    CHECK(n_kernels > 0 || !ggml_cpu_has_avx2());
}

TEST("gemm on interleaved inputs gives the numbers of gemv, and the bits where it is said to") {
    ggml_cpu_init();
    constexpr int                   N_IN = 768, N_OUT = 40, N_ROWS = 24;
    std::mt19937                    random(3);
    std::normal_distribution<float> normal;
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q2_K, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4 }) {
        const hobbit::repack_kernel * kernel = hobbit::find_repack_kernel(type, N_IN, N_OUT);
        if (kernel == nullptr) {
            continue;
        }
        std::vector<float> weights(N_IN * N_OUT), x(N_IN * N_ROWS);
        for (std::vector<float> * v : { &weights, &x }) {
            for (float & f : *v) {
                f = normal(random);
            }
        }
        std::vector<std::byte> w(ggml_row_size(type, N_IN) * N_OUT);
        ggml_quantize_chunk(type, weights.data(), w.data(), 0, N_OUT, N_IN, nullptr);
        hobbit::repack_slice(*kernel, N_IN, N_OUT, w.data());
        const ggml_type    y_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
        const size_t       row    = ggml_row_size(y_type, N_IN);
        std::vector<char>  y(row * N_ROWS), y4(y.size());
        std::vector<float> one_by_one(N_OUT * N_ROWS), together(one_by_one.size());
        for (int i = 0; i < N_ROWS; ++i) {
            ggml_get_type_traits_cpu(y_type)->from_float(&x[(size_t) i * N_IN], &y[i * row], N_IN);
            kernel->gemv(N_IN, &one_by_one[(size_t) i * N_OUT], N_OUT, w.data(), &y[i * row], 1, N_OUT);
        }
        for (int i = 0; i < N_ROWS; i += 4) {
            const char * const rows[4] = { &y[i * row], &y[(i + 1) * row], &y[(i + 2) * row], &y[(i + 3) * row] };
            hobbit::interleave_inputs(y_type, rows, N_IN, &y4[i * row]);
        }
        kernel->gemm(N_IN, together.data(), N_OUT, w.data(), y4.data(), N_ROWS, N_OUT);
        for (size_t i = 0; i < together.size(); ++i) {
            CHECK(std::abs(together[i] - one_by_one[i]) <= 1e-5f * (1.0f + std::abs(one_by_one[i])) * 30.0f);
        }
        if (hobbit::gemm_has_bits_of_gemv(*kernel)) {
            CHECK(together == one_by_one);
        }
    }
}

TEST("rows that do not come in eights are not repacked") {
    CHECK(hobbit::find_repack_kernel(GGML_TYPE_Q4_K, 256, 12) == nullptr);
    CHECK(hobbit::find_repack_kernel(GGML_TYPE_F16, 256, 8) == nullptr);
}

TEST_MAIN()
