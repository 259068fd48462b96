#include "routers.h"

#include "../engine/session.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

// upstream, private
#include "llama-hparams.h"

namespace hobbit {

static_assert(LLAMA_CPP_EXPERTS == LLAMA_MAX_EXPERTS && LLAMA_CPP_LAYERS == LLAMA_MAX_LAYERS);

ggml_routers::ggml_routers(const expert_index & index) : index_(index), routers_(index.layers().size()) {}

// Floats of a one-dimensional weight that lies in host memory, NULL otherwise.
static const float * host_floats(const ggml_tensor * t, int64_t n) {
    if (t == nullptr || t->type != GGML_TYPE_F32 || t->buffer == nullptr || t->ne[0] != n || ggml_nelements(t) != n ||
        !ggml_backend_buffer_is_host(t->buffer) || t->data == nullptr) {
        return nullptr;
    }
    return (const float *) t->data;
}

void ggml_routers::learn(uint32_t layer, const hobbit_moe & moe, const ggml_tensor * product, uint32_t k) {
    router & r = routers_[layer];
    if (r.known.load(std::memory_order_acquire)) {
        return;
    }
    const ggml_tensor * w     = product->src[0];
    const ggml_tensor * input = product->src[1];
    // A router that lies repacked or on a device is not predicted from, and one layer's input must fit the next one's router.
    if (w->buffer == nullptr || !ggml_backend_buffer_is_host(w->buffer) || w->data == nullptr || w->ne[1] < k ||
        w->ne[2] != 1 || ggml_get_type_traits_cpu(w->type)->vec_dot == nullptr || (n_embd_ != 0 && w->ne[0] != n_embd_)) {
        return;
    }
    n_embd_              = w->ne[0];
    r.shape.n_expert     = (uint32_t) w->ne[1];
    r.shape.k            = k;
    r.shape.n_group      = index_.n_group;
    r.shape.n_group_used = index_.n_group_used;
    switch (moe.gating) {
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID:
            r.shape.function = policy::gating::sigmoid;
            break;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT:
            r.shape.function = policy::gating::softmax_over_selected;
            break;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS:
            r.shape.function = policy::gating::sqrt_softplus;
            break;
        default:
            r.shape.function = policy::gating::softmax;
            break;
    }
    r.weight         = w;
    r.bias           = host_floats(moe.gate_inp_b, w->ne[1]);
    r.selection_bias = host_floats(moe.selection_bias, w->ne[1]);
    if (input->op == GGML_OP_MUL) {  // norm(x) * gain
        for (const ggml_tensor * gain : { input->src[1], input->src[0] }) {
            r.norm = r.norm != nullptr ? r.norm : host_floats(gain, w->ne[0]);
        }
    }
    r.known.store(true, std::memory_order_release);
}

bool ggml_routers::fits(const ggml_tensor * input) const { return n_embd_ == 0 || input->ne[0] == n_embd_; }

bool ggml_routers::shape(uint32_t layer, policy::router_shape & out) {
    if (!routers_[layer].known.load(std::memory_order_acquire)) {
        return false;
    }
    out = routers_[layer].shape;
    return true;
}

const float * ggml_routers::bias(uint32_t layer) { return routers_[layer].bias; }

const float * ggml_routers::selection_bias(uint32_t layer) { return routers_[layer].selection_bias; }

bool ggml_routers::logits(uint32_t from, uint32_t to, const float * x, bool norm_correction, float * out) {
    const router &      r = routers_[to];
    const ggml_tensor * w = r.weight;
    const int64_t       n = w->ne[0];

    const float * gain_from = routers_[from].known.load(std::memory_order_acquire) ? routers_[from].norm : nullptr;
    if (norm_correction && gain_from != nullptr && r.norm != nullptr) {
        scaled_.resize((size_t) n);
        for (int64_t i = 0; i < n; ++i) {
            scaled_[(size_t) i] = gain_from[i] == 0.0f ? 0.0f : x[i] * (r.norm[i] / gain_from[i]);
        }
        x = scaled_.data();
    }
    const auto * traits = ggml_get_type_traits_cpu(w->type);
    const void * y      = x;
    if (traits->vec_dot_type != GGML_TYPE_F32) {
        packed_.resize(ggml_row_size(traits->vec_dot_type, n));
        ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x, packed_.data(), n);
        y = packed_.data();
    }
    for (uint32_t e = 0; e < r.shape.n_expert; ++e) {
        traits->vec_dot((int) n, out + e, 0, (const char *) w->data + e * w->nb[1], 0, y, 0, 1);
        out[e] += r.bias != nullptr ? r.bias[e] : 0.0f;
    }
    return true;
}

}  // namespace hobbit
