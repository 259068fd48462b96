#include "route.h"

#include "expert-buffer.h"
#include "routers.h"

#include <cstring>

namespace hobbit {

// The node's function. weights [1, k, n_tokens] in, the same out.
static void run_route(ggml_tensor * dst, int ith, int, void * userdata) {
    if (ith != 0) {
        return;
    }
    const auto *        expert  = (const expert_tensor *) userdata;
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * ids     = dst->src[1];
    const ggml_tensor * input   = dst->src[2];

    layer_pass::selections sel;
    sel.ids            = (const int32_t *) ids->data;
    sel.ids_stride     = ids->nb[1] / sizeof(int32_t);
    sel.weights        = (const float *) weights->data;
    sel.weights_stride = weights->nb[2] / sizeof(float);
    sel.k              = (uint32_t) ids->ne[0];
    sel.n_tokens       = (uint32_t) ids->ne[1];
    // Anything that fails below is recorded and stops llama_decode; until then the numbers must be defined.
    memset(dst->data, 0, ggml_nbytes(dst));
    if (sel.n_tokens == 0) {
        return;
    }
    expert->owner().route(expert->layer(), ids, sel, (int32_t *) ids->data, (const float *) input->data,
                          (size_t) input->ne[0], input->nb[1] / sizeof(float), (float *) dst->data);
}

ggml_tensor * build_route(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, ggml_tensor * input,
                          const hobbit_moe & moe) {
    expert_tensor * expert = nullptr;
    for (const ggml_tensor * t : { moe.down, moe.up, moe.gate, moe.gate_up }) {
        expert = expert != nullptr ? expert : find_expert_tensor(t);
    }
    const bool plain = weights->type == GGML_TYPE_F32 && ids->type == GGML_TYPE_I32 && input->type == GGML_TYPE_F32 &&
                       weights->ne[0] == 1 && weights->ne[1] == ids->ne[0] && weights->ne[2] == ids->ne[1] &&
                       weights->nb[1] == sizeof(float) && ids->nb[0] == sizeof(int32_t) && input->nb[0] == sizeof(float);
    if (expert == nullptr || !plain) {
        return weights;  // the products then find their experts by themselves, in high precision
    }
    if (expert->owner().routers() != nullptr) {
        ((ggml_routers *) expert->owner().routers())->learn(expert->layer(), moe, input, (uint32_t) ids->ne[0]);
    }
    ggml_tensor * args[] = { weights, ids, input };
    ggml_tensor * out =
        ggml_custom_4d(ctx, GGML_TYPE_F32, 1, weights->ne[1], weights->ne[2], 1, args, 3, run_route, 1, expert);
    ggml_set_name(out, "hobbit_route");
    return out;
}

}  // namespace hobbit
