#include "tile-trial.h"

#include "../base/memory.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

namespace hobbit {

bool has_bits_of(const trial_product & product, const tile_kernel & kernel) {
    constexpr int64_t N = TRIAL_LENGTH, N_C = 19;  // more rows of inputs than any kernel takes at a time, and an odd one
    const int64_t     n_r    = product.n_r;
    const auto        type   = (ggml_type) kernel.type;
    const ggml_type   x_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const size_t      w_row = ggml_row_size(type, N), x_row = ggml_row_size(x_type, N);
    std::minstd_rand  random(1);
    std::normal_distribution<float> normal;
    const auto                      numbers = [&](int64_t n) {
        std::vector<float> out((size_t) n);
        std::generate(out.begin(), out.end(), [&] { return normal(random); });
        return out;
    };
    std::vector<std::byte> w(w_row * (size_t) n_r);
    ggml_quantize_chunk(type, numbers(N * n_r).data(), w.data(), 0, n_r, N, nullptr);
    if (product.arrange) {
        product.arrange(w.data());
    }
    std::vector<char>  x(x_row * N_C);
    const char *       rows[N_C];
    float *            out[N_C];
    std::vector<float> tiled((size_t) (n_r * N_C)), plain(tiled.size());
    for (int64_t c = 0; c < N_C; ++c) {
        rows[c] = &x[(size_t) c * x_row];
        out[c]  = &tiled[(size_t) (c * n_r)];
        ggml_get_type_traits_cpu(x_type)->from_float(numbers(N).data(), &x[(size_t) c * x_row], N);
        product.multiply(w.data(), rows[c], &plain[(size_t) (c * n_r)]);
    }
    std::vector<std::byte> room(kernel.prepared_bytes(N, N_C) + 64);
    auto *                 prepared = (std::byte *) align_up((size_t) room.data(), 64);
    kernel.prepare(rows, N, N_C, prepared);
    kernel.multiply(N, (const char *) w.data(), w_row, n_r, prepared, N_C, out);
    return memcmp(tiled.data(), plain.data(), plain.size() * sizeof(float)) == 0;
}

std::map<int32_t, const tile_kernel *> first_with_bits(const std::vector<tile_kernel> &                 kernels,
                                                       const std::function<bool(const tile_kernel &)> & passes) {
    std::map<int32_t, const tile_kernel *> of_type;
    for (const tile_kernel & kernel : kernels) {
        const tile_kernel *& first = of_type[kernel.type];
        if (first == nullptr && passes(kernel)) {
            first = &kernel;
        }
    }
    return of_type;
}

}  // namespace hobbit
