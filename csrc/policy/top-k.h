// From router logits to the experts a router would select: the arithmetic of llama.cpp's build_moe_ffn, for predictions.
#pragma once

#include <cstdint>
#include <vector>

namespace hobbit::policy {

enum class gating { softmax, sigmoid, softmax_over_selected, sqrt_softplus };

struct router_shape {
    uint32_t n_expert     = 0;
    uint32_t k            = 0;
    gating   function     = gating::softmax;
    uint32_t n_group      = 0;  // expert groups (DeepSeek-V3); 0 or 1: none
    uint32_t n_group_used = 0;
};

struct prediction {
    std::vector<uint16_t> experts;  // by falling selection score
    std::vector<float>    weights;  // router weights, normalised over the selection
};

// `logits`: n_expert values, overwritten. `selection_bias`: NULL or n_expert values added for the ranking only.
void predict_top_k(const router_shape & shape, float * logits, const float * selection_bias, prediction & out);

}  // namespace hobbit::policy
