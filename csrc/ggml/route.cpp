#include "route.h"

#include "expert-buffer.h"
#include "routers.h"

// upstream, private
#include "ggml-impl.h"

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
    const ggml_tensor * input   = dst->src[2];  // NULL: not known
    const ggml_tensor * logits  = dst->src[3];  // as input

    layer_pass::selections sel;
    sel.ids            = (const int32_t *) ids->data;
    sel.ids_stride     = ids->nb[1] / sizeof(int32_t);
    sel.weights        = (const float *) weights->data;
    sel.weights_stride = weights->nb[2] / sizeof(float);
    sel.k              = (uint32_t) ids->ne[0];
    sel.n_tokens       = (uint32_t) ids->ne[1];
    sel.gains          = expert->weights_are_gains();
    // Anything that fails below is recorded and stops llama_decode; until then the numbers must be defined.
    memset(dst->data, 0, ggml_nbytes(dst));
    if (sel.n_tokens == 0) {
        return;
    }
    router_rows rows;
    if (input != nullptr) {
        rows.x             = (const float *) input->data;
        rows.n_embd        = (size_t) input->ne[0];
        rows.x_stride      = input->nb[1] / sizeof(float);
        rows.logits        = (const float *) logits->data;
        rows.logits_stride = logits->nb[1] / sizeof(float);
    }
    expert->owner().route(expert->layer(), ids, sel, (int32_t *) ids->data, rows, (float *) dst->data);
}

// The product of a router's weights [n_embd, n_expert] with its input that `ids` were chosen by: up through what
// build_moe_ffn does with the logits (bias, probabilities, groups, sorting), whoever multiplied. Not always the layer's
// own input: some routers look at the attention's output, at the layer's input, or at the full width of a latent. NULL
// when the ids come from elsewhere (a table by token id).
static ggml_tensor * find_router_product(ggml_tensor * t, int64_t n_expert, int depth) {
    constexpr int MAX_DEPTH = 20;
    if (t == nullptr || t->op == GGML_OP_NONE || depth > MAX_DEPTH) {
        return nullptr;
    }
    if (t->op == GGML_OP_MUL_MAT) {
        return t->src[0]->op == GGML_OP_NONE && t->src[0]->ne[1] == n_expert ? t : nullptr;
    }
    for (ggml_tensor * src : t->src) {
        if (ggml_tensor * found = find_router_product(src, n_expert, depth + 1)) {
            return found;
        }
    }
    return nullptr;
}

bool is_route(const ggml_tensor * t) {
    if (t == nullptr || t->op != GGML_OP_CUSTOM) {
        return false;
    }
    ggml_custom_op_params params;
    memcpy(&params, t->op_params, sizeof(params));
    return params.fun == run_route;
}

ggml_tensor * build_route(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, const hobbit_moe & moe) {
    expert_tensor * expert = nullptr;
    for (const ggml_tensor * t : { moe.gate_up, moe.up, moe.gate, moe.down }) {
        expert = expert != nullptr ? expert : find_expert_tensor(t);
    }
    const bool plain = weights->type == GGML_TYPE_F32 && ids->type == GGML_TYPE_I32 && weights->ne[0] == 1 &&
                       weights->ne[1] == ids->ne[0] && weights->ne[2] == ids->ne[1] && weights->nb[1] == sizeof(float) &&
                       ids->nb[0] == sizeof(int32_t);
    if (expert == nullptr || !plain) {
        return weights;  // the products then find their experts by themselves, in high precision
    }
    const int64_t n_expert = expert->owner().index().layers()[expert->layer()].n_expert;
    ggml_tensor * product  = find_router_product(ids, n_expert, 0);
    ggml_tensor * input    = product == nullptr ? nullptr : product->src[1];
    auto *        routers  = (ggml_routers *) expert->owner().routers();
    if (product != nullptr && routers != nullptr) {
        routers->learn(expert->layer(), moe, product, (uint32_t) ids->ne[0]);
    }
    // Rows of the input must be the rows of the selection (a model may drop tokens without output in between).
    const bool usable = input != nullptr && input->type == GGML_TYPE_F32 && input->ne[1] == ids->ne[1] &&
                        input->ne[2] == 1 && input->ne[3] == 1 && input->nb[0] == sizeof(float) &&
                        (routers == nullptr || routers->fits(input));
    ggml_tensor * args[] = { weights, ids, input, product };
    ggml_tensor * out =
        ggml_custom_4d(ctx, GGML_TYPE_F32, 1, weights->ne[1], weights->ne[2], 1, args, usable ? 4 : 2, run_route, 1, expert);
    ggml_set_name(out, "hobbit_route");
    return out;
}

}  // namespace hobbit
