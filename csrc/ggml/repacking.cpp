#include "repacking.h"

#include "interleave.h"

#include "ggml-backend.h"
#include "ggml.h"

// upstream, private
#include "ggml-backend-impl.h"
#include "repack.h"

#include <cstring>
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
    { GGML_TYPE_Q4_0, 8, ggml_gemv_q4_0_8x8_q8_0, repack<block_q4_0, 8, 8> },
    { GGML_TYPE_Q4_K, 8, ggml_gemv_q4_K_8x8_q8_K, interleave_q4_K },
    { GGML_TYPE_Q2_K, 8, ggml_gemv_q2_K_8x8_q8_K, interleave_q2_K },
    { GGML_TYPE_IQ4_NL, 8, ggml_gemv_iq4_nl_8x8_q8_0, repack<block_iq4_nl, 8, 8> },
    { GGML_TYPE_MXFP4, 8, ggml_gemv_mxfp4_8x8_q8_0, repack<block_mxfp4, 8, 8> },
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
