// Routing that was recorded, used in place of the model's own routers: by a model whose weights are random but whose shape is
// real, and by the replay without a model.
#pragma once

#include "../hobbit.h"
#include "prefetcher.h"

#include <vector>

namespace hobbit {

// Also the routers, as the prefetcher sees them: the "router input" of a layer is what was predicted from it.
class recorded_routing : public router_source {
  public:
    // Copies. Throws HOBBIT_ERR_INVALID_ARGUMENT for what does not fit a model with `experts` in each layer, top-`k`. A layer that
    // selects fewer than k takes the first of a row.
    recorded_routing(const hobbit_routing & from, std::vector<uint32_t> experts, uint32_t k);

    // The first layer of a batch: its tokens follow those of the batch before. Rows and layers are taken modulo.
    void begin_pass(uint32_t n_tokens);

    // From the first row again.
    void rewind() { next_ = pass_tokens_ = 0; }

    uint64_t n_rows() const { return n_rows_; }

    uint32_t n_layer() const { return n_layer_; }

    const uint16_t * row_ids(uint64_t row, uint32_t layer) const { return &ids_[(row * n_layer_ + layer) * k_]; }

    const float * row_weights(uint64_t row, uint32_t layer) const { return &weights_[(row * n_layer_ + layer) * k_]; }

    // Of token `i` of the `n_tokens` that the layer computes: the last of the batch where it computes fewer.
    const uint16_t * ids(uint32_t layer, uint32_t i, uint32_t n_tokens) const;
    const float *    weights(uint32_t layer, uint32_t i, uint32_t n_tokens) const;

    // What was predicted from the router input of `layer`, for logits(). NULL when nothing was.
    const float * input(uint32_t layer, uint32_t n_tokens);

    size_t input_size() const { return (size_t) depth_ * n_predicted_ * 2; }

    bool          shape(uint32_t layer, policy::router_shape & out) override;
    bool          logits(uint32_t from, uint32_t to, const float * x, bool norm_correction, float * out) override;
    const float * bias(uint32_t layer) override;
    const float * selection_bias(uint32_t layer) override;

  private:
    size_t row_of(uint32_t i, uint32_t n_tokens) const;

    // Throws when one of the `ids`, `per_layer` of each layer of the trace, is no expert of the layers that it stands for.
    void check_experts(const std::vector<uint16_t> & ids, size_t per_layer, const char * does) const;

    const std::vector<uint32_t> experts_;  // of each layer of the model
    const uint32_t              k_;
    uint64_t                    n_rows_;
    uint32_t                    n_layer_;  // of the trace
    uint32_t                    depth_;
    uint32_t                    n_predicted_;
    std::vector<uint16_t>       ids_;
    std::vector<float>          weights_;
    std::vector<uint16_t>       predicted_;
    std::vector<float>          predicted_weights_;
    std::vector<float>          input_;
    uint64_t                    next_        = 0;  // row of the token after this batch
    uint32_t                    pass_tokens_ = 0;
};

}  // namespace hobbit
