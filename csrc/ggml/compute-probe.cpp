#include "compute-probe.h"

#include "../base/error.h"
#include "repacking.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

// upstream, private
#include "repack.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace hobbit {

namespace {

using steady = std::chrono::steady_clock;

// Of weights that are gone through between two uses of the same: more than the last-level caches of ordinary machines.
constexpr size_t WORKING_SET = 160u << 20;
constexpr size_t MAX_NODES   = 4096;
// Of one turn: short enough to get through undisturbed now and then on a machine that does other things too.
constexpr size_t TURN = 16u << 20;

template <typename T, void (*free_one)(T *)>
struct deleter {
    void operator()(T * p) const { free_one(p); }
};

using context_ptr = std::unique_ptr<ggml_context, deleter<ggml_context, ggml_free>>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, deleter<ggml_backend_buffer, ggml_backend_buffer_free>>;
using pool_ptr    = std::unique_ptr<ggml_threadpool, deleter<ggml_threadpool, ggml_threadpool_free>>;

context_ptr new_context(size_t n_bytes) { return context_ptr(ggml_init({ n_bytes, nullptr, true })); }

buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
    if (!buffer) {
        fail(HOBBIT_ERR_NO_MEMORY, "no memory to measure the speed of products in");
    }
    return buffer;
}

// A matrix with sane values: one row, quantised by ggml, again and again.
std::vector<char> make_matrix(ggml_type type, int64_t n_in, int64_t n_out) {
    std::vector<float> row((size_t) n_in), ones((size_t) n_in, 1.0f);
    for (size_t i = 0; i < row.size(); ++i) {
        row[i] = (float) std::sin(0.37 * (double) i) / std::sqrt((float) n_in);
    }
    const size_t      bytes = ggml_row_size(type, n_in);
    std::vector<char> out(bytes * (size_t) n_out);
    ggml_quantize_chunk(type, row.data(), out.data(), 0, 1, n_in, ones.data());
    for (int64_t i = 1; i < n_out; ++i) {
        std::copy_n(out.data(), bytes, out.data() + (size_t) i * bytes);
    }
    return out;
}

}  // namespace

double probe_compute(int32_t type_number, int64_t n_in, int64_t n_out, uint32_t n_threads, double seconds) {
    require(type_number >= 0 && type_number < GGML_TYPE_COUNT, "unknown type");
    const auto type = (ggml_type) type_number;
    require(ggml_blck_size(type) > 0 && ggml_get_type_traits_cpu(type)->vec_dot != nullptr,
            "ggml cannot multiply by this type");
    require(type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || ggml_is_quantized(type),
            "this is no type of weights");
    require(n_in > 0 && n_out > 0 && n_in % ggml_blck_size(type) == 0, "rows must be whole blocks of the type");
    require(n_threads >= 1 && n_threads <= GGML_MAX_N_THREADS, "n_threads is out of range");

    const size_t matrix = ggml_row_size(type, n_in) * (size_t) n_out;
    require(matrix <= (size_t) 1 << 31, "the matrix is too large to measure with");
    const size_t n      = std::min<size_t>(std::max<size_t>(WORKING_SET / matrix, 1), MAX_NODES);
    const bool   repack = find_repack_kernel(type, n_in, n_out) != nullptr;

    context_ptr                weights = new_context(ggml_tensor_overhead() * (n + 1));
    std::vector<ggml_tensor *> w;
    for (size_t i = 0; i < n; ++i) {
        w.push_back(ggml_new_tensor_2d(weights.get(), type, n_in, n_out));
    }
    const buffer_ptr weight_buffer =
        allocate(weights.get(), repack ? ggml_backend_cpu_repack_buffer_type() : ggml_backend_cpu_buffer_type());
    // Through the buffer once, which repacks; the others are copies of the result.
    const std::vector<char> data = make_matrix(type, n_in, n_out);
    ggml_backend_tensor_set(w[0], data.data(), 0, data.size());
    for (size_t i = 1; i < n; ++i) {
        memcpy(w[i]->data, w[0]->data, matrix);
    }

    const size_t  n_turn  = std::max<size_t>(std::min(n, TURN / matrix), 1);
    const size_t  n_graph = n / n_turn;
    const size_t  size    = 2 * n_turn + 2;  // leaves count too
    context_ptr   nodes = new_context(ggml_tensor_overhead() * (n + 2) + n_graph * ggml_graph_overhead_custom(size, false));
    ggml_tensor * x     = ggml_new_tensor_1d(nodes.get(), GGML_TYPE_F32, n_in);
    std::vector<ggml_cgraph *> graphs;
    for (size_t i = 0; i < n_graph; ++i) {
        graphs.push_back(ggml_new_graph_custom(nodes.get(), size, false));
        for (size_t k = 0; k < n_turn; ++k) {
            ggml_build_forward_expand(graphs[i], ggml_mul_mat(nodes.get(), w[i * n_turn + k], x));
        }
    }
    const buffer_ptr node_buffer = allocate(nodes.get(), ggml_backend_cpu_buffer_type());
    const auto       input       = std::vector<float>((size_t) n_in, 0.5f);
    ggml_backend_tensor_set(x, input.data(), 0, input.size() * sizeof(float));

    ggml_threadpool_params pool_params = ggml_threadpool_params_default((int) n_threads);
    const pool_ptr         pool(ggml_threadpool_new(&pool_params));
    ggml_cplan             plan = ggml_graph_plan(graphs[0], (int) n_threads, pool.get());
    std::vector<uint8_t>   work(plan.work_size);
    plan.work_data = work.data();

    // The quickest turn: whatever else the machine does can only make it slower. The first one is not counted: caches, waking up.
    const auto begin = steady::now();
    const auto spent = [&] { return std::chrono::duration<double>(steady::now() - begin).count(); };
    double     best  = 0.0;
    ggml_graph_compute(graphs[0], &plan);
    for (size_t turn = 1; best == 0.0 || spent() < seconds; ++turn) {
        const auto before = steady::now();
        ggml_graph_compute(graphs[turn % n_graph], &plan);
        const double took = std::chrono::duration<double>(steady::now() - before).count();
        best              = best == 0.0 ? took : std::min(best, took);
    }
    return (double) (n_turn * matrix) / best;
}

}  // namespace hobbit
