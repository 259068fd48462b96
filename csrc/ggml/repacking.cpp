#include "repacking.h"

#include "interleave.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#include "ggml-backend-impl.h"
#include "repack.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <vector>

// Upstream's functions behind the buffer's set_tensor. That one writes a line to the log each time, and the log may be a function in
// Python: for every eight rows of every expert that arrives, that took ten times as long as the reading.
namespace ggml::cpu::repack {
template <typename block_t, int64_t interleave, int64_t columns>
int repack(ggml_tensor * group, const void * plain, size_t bytes);
template <>
int repack<block_q4_0, 8, 8>(ggml_tensor * group, const void * plain, size_t bytes);
template <>
int repack<block_iq4_nl, 8, 8>(ggml_tensor * group, const void * plain, size_t bytes);
template <>
int repack<block_mxfp4, 8, 8>(ggml_tensor * group, const void * plain, size_t bytes);
}  // namespace ggml::cpu::repack

namespace hobbit {

namespace {

using ggml::cpu::repack::repack;

// The kernels of x86-64; which of them are used depends on the CPU, and that is upstream's decision (asked below).
const repack_kernel KERNELS[] = {
    { GGML_TYPE_Q4_0, 8, ggml_gemv_q4_0_8x8_q8_0, ggml_gemm_q4_0_8x8_q8_0, repack<block_q4_0, 8, 8> },
    { GGML_TYPE_Q4_K, 8, ggml_gemv_q4_K_8x8_q8_K, ggml_gemm_q4_K_8x8_q8_K, interleave_q4_K },
    { GGML_TYPE_Q2_K, 8, ggml_gemv_q2_K_8x8_q8_K, ggml_gemm_q2_K_8x8_q8_K, interleave_q2_K },
    { GGML_TYPE_IQ4_NL, 8, ggml_gemv_iq4_nl_8x8_q8_0, ggml_gemm_iq4_nl_8x8_q8_0, repack<block_iq4_nl, 8, 8> },
    { GGML_TYPE_MXFP4, 8, ggml_gemv_mxfp4_8x8_q8_0, ggml_gemm_mxfp4_8x8_q8_0, repack<block_mxfp4, 8, 8> },
};

// An empty buffer of upstream's repacking type: the way to its functions.
ggml_backend_buffer_t repack_buffer() {
    static ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_repack_buffer_type(), 64);
    return buffer;
}

// A tensor of [n_in, n_out, n_expert] without data, with upstream's choice of a kernel in `extra`.
ggml_tensor describe(int32_t type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    ggml_tensor t = {};
    t.type        = (ggml_type) type;
    t.ne[0]       = n_in;
    t.ne[1]       = n_out;
    t.ne[2]       = n_expert;
    t.ne[3]       = 1;
    t.nb[0]       = ggml_type_size(t.type);
    t.nb[1]       = ggml_row_size(t.type, n_in);
    t.nb[2]       = t.nb[1] * (size_t) n_out;
    t.nb[3]       = t.nb[2] * (size_t) n_expert;
    t.buffer      = repack_buffer();
    t.buffer->iface.init_tensor(t.buffer, &t);
    return t;
}

}  // namespace

const repack_kernel * find_repack_kernel(int32_t type, int64_t n_in, int64_t n_out) {
#if defined(__x86_64__)
    for (const repack_kernel & kernel : KERNELS) {
        if (kernel.type == type && repack_buffer() != nullptr && describe(type, n_in, n_out, 2).extra != nullptr) {
            return &kernel;
        }
    }
#endif
    return nullptr;
}

static bool try_gemm(const repack_kernel & kernel) {
    // Two super-blocks; both widths of the kernels, in rows (16 + 4) and in columns (16 + 8).
    constexpr int                   N_IN = 512, N_OUT = 24, N_ROWS = 20;
    const auto                      type   = (ggml_type) kernel.type;
    const ggml_type                 y_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const size_t                    y_row  = ggml_row_size(y_type, N_IN);
    std::minstd_rand                random(1);
    std::normal_distribution<float> normal;
    const auto                      numbers = [&](size_t n) {
        std::vector<float> out(n);
        std::generate(out.begin(), out.end(), [&] { return normal(random); });
        return out;
    };
    std::vector<std::byte>   w(ggml_row_size(type, N_IN) * N_OUT);
    const std::vector<float> weights = numbers(N_IN * N_OUT), inputs = numbers(N_IN * N_ROWS);
    ggml_quantize_chunk(type, weights.data(), w.data(), 0, N_OUT, N_IN, nullptr);
    repack_slice(kernel, N_IN, N_OUT, w.data());
    std::vector<char>  y(y_row * N_ROWS), y4(y_row * N_ROWS);
    std::vector<float> by_gemv(N_OUT * N_ROWS), by_gemm(N_OUT * N_ROWS);
    for (int i = 0; i < N_ROWS; ++i) {
        ggml_get_type_traits_cpu(y_type)->from_float(&inputs[(size_t) i * N_IN], &y[i * y_row], N_IN);
        kernel.gemv(N_IN, &by_gemv[(size_t) i * N_OUT], N_OUT, w.data(), &y[i * y_row], 1, N_OUT);
    }
    for (int i = 0; i < N_ROWS; i += 4) {
        const char * const rows[4] = { &y[i * y_row], &y[(i + 1) * y_row], &y[(i + 2) * y_row], &y[(i + 3) * y_row] };
        interleave_inputs(y_type, rows, N_IN, &y4[i * y_row]);
    }
    kernel.gemm(N_IN, by_gemm.data(), N_OUT, w.data(), y4.data(), N_ROWS, N_OUT);
    return memcmp(by_gemv.data(), by_gemm.data(), by_gemv.size() * sizeof(float)) == 0;
}

bool gemm_has_bits_of_gemv(const repack_kernel & kernel) {
    static std::mutex                            mutex;
    static std::map<const repack_kernel *, bool> known;
    std::lock_guard<std::mutex>                  lock(mutex);
    const auto [at, is_new] = known.emplace(&kernel, false);
    if (is_new) {
        at->second = try_gemm(kernel);
    }
    return at->second;
}

void repack_slice(const repack_kernel & kernel, int64_t n_in, int64_t n_out, std::byte * slice) {
    ggml_tensor                           group = describe(kernel.type, n_in, kernel.columns, 1);
    const size_t                          bytes = group.nb[2];
    static thread_local std::vector<char> plain;
    plain.resize(bytes);
    for (int64_t row = 0; row < n_out; row += kernel.columns) {
        memcpy(plain.data(), slice, bytes);
        group.data = slice;
        kernel.repack(&group, plain.data(), bytes);
        slice += bytes;
    }
}

}  // namespace hobbit
