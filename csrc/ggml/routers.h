// The model's routers as llama.cpp holds them, learnt from the graph: no architecture is named here.
#pragma once

#include "../engine/prefetcher.h"
#include "ggml.h"
#include "hobbit-hooks.h"

#include <atomic>
#include <vector>

namespace hobbit {

class ggml_routers : public router_source {
  public:
    explicit ggml_routers(const expert_index & index);

    // Called while a graph is built, once per layer and graph; the first call counts. `product`: MUL_MAT of the router's
    // weights [n_embd, n_expert] and its input.
    void learn(uint32_t layer, const hobbit_moe & moe, const ggml_tensor * product, uint32_t k);

    // Whether such an input is as wide as that of the routers known.
    bool fits(const ggml_tensor * input) const;

    bool          shape(uint32_t layer, policy::router_shape & out) override;
    bool          logits(uint32_t from, uint32_t to, const float * x, bool norm_correction, float * out) override;
    const float * bias(uint32_t layer) override;
    const float * selection_bias(uint32_t layer) override;

  private:
    struct router {
        std::atomic<bool>    known { false };  // set last
        policy::router_shape shape;
        const ggml_tensor *  weight         = nullptr;
        const float *        bias           = nullptr;
        const float *        selection_bias = nullptr;
        const float *        norm           = nullptr;  // gain of the norm before it, n_embd values
    };

    const expert_index & index_;
    std::vector<router>  routers_;
    int64_t              n_embd_ = 0;  // of the routers' input, 0: none known yet
    std::vector<float>   scaled_;      // of logits(): one caller at a time
    std::vector<char>    packed_;
};

}  // namespace hobbit
