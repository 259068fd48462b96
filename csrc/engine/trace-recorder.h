// The routing of a model as it runs, for `hobbit trace`, recordings and tests; and what its routers predict of one another.
#pragma once

#include "layer-pass.h"
#include "prefetcher.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace hobbit {

class trace_recorder {
  public:
    explicit trace_recorder(const expert_index & index) : index_(index) {}

    bool on() const { return on_.load(std::memory_order_relaxed); }

    // Anew: selections, with predictions up to `depth` layers ahead, until a batch would
    // make it more than `max_tokens` tokens.
    void begin(uint32_t depth, uint64_t max_tokens);

    // Forgets what was recorded.
    void end();

    // A layer of a batch, first layer first. `rows.x` NULL: no predictions.
    void record(uint32_t layer, const layer_pass::selections & sel, const router_rows & rows, router_source * routers,
                bool norm_correction);

    // Copies at most max_rows rows, [n_layer][k] each; returns those there are.
    uint64_t read(uint64_t max_rows, uint16_t * ids, float * weights) const;

    // Likewise, [n_layer][depth][n_predicted].
    uint64_t read_predictions(uint64_t max_rows, uint16_t * ids, float * weights) const;

    // Experts of a recorded prediction: enough to see what reading more than k of them would bring.
    uint32_t n_predicted() const { return std::min(index_.n_expert, 2 * index_.n_expert_used); }

  private:
    void record_row(uint32_t layer, const layer_pass::selections & sel, uint32_t i, uint16_t * ids, float * weights) const;
    void predict(uint32_t layer, uint32_t n_tokens, const router_rows & rows, router_source & routers, bool norm_correction);

    const expert_index & index_;
    std::atomic<bool>    on_ { false };

    mutable std::mutex    mutex_;  // guards those below; nothing is locked under it
    uint32_t              depth_      = 0;
    uint64_t              max_tokens_ = 0;
    uint64_t              n_rows_     = 0;  // begun
    uint32_t              n_batch_    = 0;  // of them in the running batch; 0: it is not recorded
    std::vector<uint16_t> ids_;
    std::vector<float>    weights_;
    std::vector<uint16_t> predicted_;
    std::vector<float>    predicted_weights_;
};

}  // namespace hobbit
