// ggml/expert-buffer.h: which uses of an expert tensor ggml may plan, and that no other one reads it.
#include "ggml/expert-buffer.h"

#include "test.h"
#include "tiny-store.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <functional>

using namespace test;
using hobbit::session;

namespace {

template <typename T>
using owned = std::unique_ptr<T, void (*)(T *)>;

// A session, one expert tensor of its model in our buffer, and a graph of one op on it.
struct story {
    using make_op = std::function<ggml_tensor *(ggml_context *, ggml_tensor * expert, ggml_tensor * x, ggml_tensor * ids)>;

    temp_folder                                                         folder;
    std::shared_ptr<session>                                            owner;
    owned<ggml_context>                                                 weights { nullptr, ggml_free };
    owned<ggml_context>                                                 nodes { nullptr, ggml_free };
    owned<ggml_backend_buffer>                                          buffer { nullptr, ggml_backend_buffer_free };
    owned<ggml_backend>                                                 cpu { ggml_backend_cpu_init(), ggml_backend_free };
    std::unique_ptr<ggml_backend_sched, void (*)(ggml_backend_sched_t)> sched { nullptr, ggml_backend_sched_free };
    ggml_tensor *                                                       out   = nullptr;
    ggml_cgraph *                                                       graph = nullptr;

    explicit story(const make_op & make) {
        const tiny_model m;
        m.write(folder.path("model.gguf"));
        hobbit::register_expert_buffers();
        owner = std::make_shared<session>(folder.path("model.gguf"), "", tiny_params());

        const ggml_init_params params = { 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        weights.reset(ggml_init(params));
        nodes.reset(ggml_init(params));
        ggml_tensor * expert = ggml_new_tensor_3d(weights.get(), GGML_TYPE_F16, m.n_in, m.n_out, m.n_expert);
        ggml_set_name(expert, "blk.1.ffn_up_exps.weight");
        const auto * overrides = (const llama_model_tensor_buft_override *) hobbit::buft_overrides(*owner);
        hobbit::bind_thread(owner);
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), overrides[0].buft));
        hobbit::bind_thread(nullptr);
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

        ggml_tensor * x   = ggml_new_tensor_3d(nodes.get(), GGML_TYPE_F32, m.n_in, 1, 2);
        ggml_tensor * ids = ggml_new_tensor_2d(nodes.get(), GGML_TYPE_I32, 2, 2);
        ggml_set_input(x);
        ggml_set_input(ids);
        out = make(nodes.get(), expert, x, ids);
        ggml_set_output(out);
        graph = ggml_new_graph(nodes.get());
        ggml_build_forward_expand(graph, out);
        ggml_backend_t             backends[] = { cpu.get() };
        ggml_backend_buffer_type_t types[]    = { ggml_backend_cpu_buffer_type() };
        sched.reset(ggml_backend_sched_new(backends, types, 1, 64, false, false));
        CHECK(ggml_backend_sched_reserve(sched.get(), graph));
    }

    ~story() { owner->stop(); }

    void start() { owner->start(hobbit::pool_min(owner->index())); }

    // What start() says; "" when nothing.
    std::string refusal() {
        try {
            start();
        } catch (const hobbit::error & e) {
            CHECK_EQ(e.status(), HOBBIT_ERR_UNSUPPORTED);
            return e.what();
        }
        return "";
    }
};

}  // namespace

TEST("the product that selects experts is planned, and the session starts") {
    story s([](auto * ctx, auto * expert, auto * x, auto * ids) { return ggml_mul_mat_id(ctx, expert, x, ids); });
    CHECK_EQ(s.refusal(), "");
}

TEST("a graph without the router's node is computed with the ids that it has, each time") {
    story s([](auto * ctx, auto * expert, auto * x, auto * ids) { return ggml_mul_mat_id(ctx, expert, x, ids); });
    const ggml_tensor *      expert = s.out->src[0];
    std::vector<ggml_fp16_t> weights((size_t) ggml_nelements(expert));
    ggml_backend_tensor_get(expert, weights.data(), 0, ggml_nbytes(expert));
    s.start();
    for (int32_t first = 0; first < 3; ++first) {
        ggml_backend_sched_reset(s.sched.get());
        CHECK(ggml_backend_sched_alloc_graph(s.sched.get(), s.graph));
        const int32_t            ids[] = { first, 5, 7, first + 1 };
        const std::vector<float> x((size_t) ggml_nelements(s.out->src[1]), 1.0f);
        ggml_backend_tensor_set(s.out->src[1], x.data(), 0, x.size() * sizeof(float));
        ggml_backend_tensor_set(s.out->src[2], ids, 0, sizeof(ids));
        CHECK_EQ(ggml_backend_sched_graph_compute(s.sched.get(), s.graph), GGML_STATUS_SUCCESS);
        CHECK(!s.owner->failed());
        const auto * got      = (const float *) s.out->data;
        size_t       n_finite = 0;
        for (int32_t i = 0; i < 4; ++i) {
            for (int64_t row = 0; row < expert->ne[1]; ++row) {
                float sum = 0.0f, size = 0.0f;  // the weights are random bits: some rows are not numbers
                for (int64_t j = 0; j < expert->ne[0]; ++j) {
                    const float w =
                        ggml_fp16_to_fp32(weights[(size_t) ((ids[i] * expert->ne[1] + row) * expert->ne[0] + j)]);
                    sum += w;
                    size += std::fabs(w);
                }
                if (std::isfinite(sum)) {
                    CHECK(std::fabs(got[i * expert->ne[1] + row] - sum) <= 1e-3f * size);
                    n_finite++;
                }
            }
        }
        CHECK(n_finite > 0);
    }
}

TEST("another op on an expert tensor is refused when its graph is planned, with its name") {
    const story::make_op ops[] = {
        [](auto * ctx, auto * expert, auto * x, auto *) {
            return ggml_mul_mat(ctx, expert, ggml_repeat_4d(ctx, x, 64, 1, 8, 1));
        },
        [](auto * ctx, auto * expert, auto *, auto *) {
            return ggml_scale(ctx, ggml_cast(ctx, expert, GGML_TYPE_F32), 2.0f);
        },
        [](auto * ctx, auto * expert, auto *, auto *) {
            return ggml_get_rows(ctx, expert, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, 8));
        },
        [](auto * ctx, auto * expert, auto *, auto *) {
            return ggml_add(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, 48, 8), expert);
        },
    };
    for (const auto & op : ops) {
        story             s(op);
        const std::string why = s.refusal();
        CHECK(why.find("blk.1.ffn_up_exps.weight") != std::string::npos);
        CHECK(why.find("offload=None") != std::string::npos);
    }
}

TEST("an op on a view of an expert tensor stops the graph, and nobody reads the tensor") {
    story s([](auto * ctx, auto * expert, auto * x, auto *) {
        ggml_tensor * first = ggml_view_2d(ctx, expert, expert->ne[0], expert->ne[1], expert->nb[1], 0);
        return ggml_mul_mat(ctx, first, ggml_reshape_2d(ctx, x, x->ne[0], 2));
    });
    s.start();
    CHECK(ggml_backend_sched_alloc_graph(s.sched.get(), s.graph));
    CHECK_EQ(ggml_backend_sched_graph_compute(s.sched.get(), s.graph), GGML_STATUS_SUCCESS);
    CHECK(s.owner->failed());
    std::exception_ptr why;
    CHECK(s.owner->take_error(why));
    CHECK_THROWS(std::rethrow_exception(why));
    const auto * values = (const float *) s.out->data;
    CHECK(std::all_of(values, values + ggml_nelements(s.out), [](float v) { return v == 0.0f; }));
}

TEST("a tensor beside the experts, such as an adapter's, lies in ordinary memory") {
    hobbit::register_expert_buffers();
    story        s([](auto * ctx, auto * expert, auto * x, auto * ids) { return ggml_mul_mat_id(ctx, expert, x, ids); });
    const auto * overrides       = (const llama_model_tensor_buft_override *) hobbit::buft_overrides(*s.owner);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(overrides[0].buft, 256);
    CHECK(buffer != nullptr);
    CHECK(ggml_backend_buffer_is_host(buffer));
    ggml_backend_buffer_free(buffer);
}

TEST_MAIN()
