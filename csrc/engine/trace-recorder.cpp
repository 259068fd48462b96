#include "trace-recorder.h"

#include "../base/error.h"

namespace hobbit {

// Tokens for which room is reserved, which takes memory only as it is filled, where growing would take it twice.
static constexpr uint64_t MAX_RESERVED = 1 << 16;

void trace_recorder::begin(uint32_t depth, uint64_t max_tokens) {
    if (depth > HOBBIT_MAX_LOOKAHEAD) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, format("predictions reach at most %d layers ahead", HOBBIT_MAX_LOOKAHEAD));
    }
    end();
    std::lock_guard<std::mutex> lock(mutex_);
    depth_      = depth;
    max_tokens_ = max_tokens;
    if (max_tokens <= MAX_RESERVED) {
        const size_t n = max_tokens * index_.layers().size() * index_.n_expert_used;
        ids_.reserve(n);
        weights_.reserve(n);
    }
    on_.store(true, std::memory_order_relaxed);
}

void trace_recorder::end() {
    std::lock_guard<std::mutex> lock(mutex_);
    on_.store(false, std::memory_order_relaxed);
    n_rows_  = 0;
    n_batch_ = depth_  = 0;
    ids_               = {};
    weights_           = {};
    predicted_         = {};
    predicted_weights_ = {};
}

void trace_recorder::record(uint32_t layer, const layer_pass::selections & sel, const router_rows & rows,
                            router_source * routers, bool norm_correction) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t                n_layer = index_.layers().size();
    const size_t                k       = index_.n_expert_used;
    if (layer == 0) {
        n_batch_           = 0;
        const size_t n_all = n_rows_ + sel.n_tokens;
        if (n_all > max_tokens_) {
            max_tokens_ = n_rows_;
            return;
        }
        const size_t guesses = n_all * n_layer * depth_ * n_predicted();
        ids_.resize(n_all * n_layer * k);
        weights_.resize(n_all * n_layer * k);
        predicted_.resize(guesses);
        predicted_weights_.resize(guesses);
        n_rows_  = n_all;  // when there is memory for all of them
        n_batch_ = sel.n_tokens;
    }
    // Left out, or begun in the middle of the batch. Of a prompt llama.cpp computes the last layer for its last tokens only.
    if (n_batch_ < sel.n_tokens) {
        return;
    }
    for (uint32_t i = 0; i < sel.n_tokens; ++i) {
        const size_t at = ((n_rows_ - sel.n_tokens + i) * n_layer + layer) * k;
        record_row(layer, sel, i, &ids_[at], &weights_[at]);
    }
    if (rows.x != nullptr && routers != nullptr) {
        predict(layer, sel.n_tokens, rows, *routers, norm_correction);
    }
}

// A trace has k different experts in each row. Where a layer selects fewer, or one of them twice, others stand there with weight 0.
void trace_recorder::record_row(uint32_t layer, const layer_pass::selections & sel, uint32_t i, uint16_t * ids,
                                float * weights) const {
    const uint32_t k = index_.n_expert_used;
    uint32_t       n = 0;
    for (uint32_t j = 0; j < std::min(k, sel.k); ++j) {
        const auto     id    = (uint16_t) sel.ids[i * sel.ids_stride + j];
        const float    w     = sel.weights == nullptr ? 0.0f : sel.weights[i * sel.weights_stride + j];
        const uint32_t place = (uint32_t) (std::find(ids, ids + n, id) - ids);
        ids[place]           = id;
        weights[place]       = (place < n ? weights[place] : 0.0f) + w;
        n                    = std::max(n, place + 1);
    }
    for (uint32_t e = 0; n < k && e < index_.layers()[layer].n_expert; ++e) {
        if (std::find(ids, ids + n, (uint16_t) e) == ids + n) {
            ids[n]       = (uint16_t) e;
            weights[n++] = 0.0f;
        }
    }
}

// Of the layers after `layer`, by their own routers on its router input.
void trace_recorder::predict(uint32_t layer, uint32_t n_tokens, const router_rows & rows, router_source & routers,
                             bool norm_correction) {
    const size_t         n_layer = index_.layers().size();
    const uint32_t       m       = n_predicted();
    std::vector<float>   logits;
    policy::prediction   guess;
    policy::router_shape shape;
    for (uint32_t d = 0; d < depth_ && layer + d + 1 < n_layer; ++d) {
        const uint32_t to = layer + d + 1;
        if (!routers.shape(to, shape)) {
            continue;
        }
        shape.k = std::min(m, shape.n_expert);
        logits.resize(shape.n_expert);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            if (!routers.logits(layer, to, rows.x + i * rows.x_stride, norm_correction, logits.data())) {
                continue;
            }
            policy::predict_top_k(shape, logits.data(), routers.selection_bias(to), guess);
            const size_t at = (((n_rows_ - n_tokens + i) * n_layer + to) * depth_ + d) * m;
            std::copy(guess.experts.begin(), guess.experts.end(), predicted_.begin() + (ptrdiff_t) at);
            std::copy(guess.weights.begin(), guess.weights.end(), predicted_weights_.begin() + (ptrdiff_t) at);
        }
    }
}

// Copies of the first rows.
static void copy_rows(uint64_t n_rows, size_t row, const std::vector<uint16_t> & ids, const std::vector<float> & weights,
                      uint16_t * out_ids, float * out_weights) {
    if (n_rows > 0 && out_ids != nullptr && out_weights != nullptr) {
        std::copy_n(ids.begin(), n_rows * row, out_ids);
        std::copy_n(weights.begin(), n_rows * row, out_weights);
    }
}

uint64_t trace_recorder::read(uint64_t max_rows, uint16_t * ids, float * weights) const {
    std::lock_guard<std::mutex> lock(mutex_);
    copy_rows(std::min(max_rows, n_rows_), index_.layers().size() * index_.n_expert_used, ids_, weights_, ids, weights);
    return n_rows_;
}

uint64_t trace_recorder::read_predictions(uint64_t max_rows, uint16_t * ids, float * weights) const {
    std::lock_guard<std::mutex> lock(mutex_);
    copy_rows(std::min(max_rows, n_rows_), index_.layers().size() * depth_ * n_predicted(), predicted_, predicted_weights_,
              ids, weights);
    return depth_ == 0 ? 0 : n_rows_;
}

}  // namespace hobbit
