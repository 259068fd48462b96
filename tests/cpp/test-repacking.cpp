// ggml/repacking.h: slices come out of it as they come out of stock llama.cpp's repacking buffer.
#include "ggml/repacking.h"

#include "test.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#include "repack.h"

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

TEST("rows that do not come in eights are not repacked") {
    CHECK(hobbit::find_repack_kernel(GGML_TYPE_Q4_K, 256, 12) == nullptr);
    CHECK(hobbit::find_repack_kernel(GGML_TYPE_F16, 256, 8) == nullptr);
}

TEST_MAIN()
