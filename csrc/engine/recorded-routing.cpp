#include "recorded-routing.h"

#include "../base/error.h"

#include <algorithm>
#include <cmath>

namespace hobbit {

static void check_distinct(const std::vector<uint16_t> & ids, uint32_t k) {
    for (size_t row = 0; row < ids.size(); row += k) {
        for (size_t i = row; i < row + k; ++i) {
            for (size_t j = row; j < i; ++j) {
                require(ids[j] != ids[i], format("the routing selects expert %u twice for one token and layer", ids[i]));
            }
        }
    }
}

void recorded_routing::check_experts(const std::vector<uint16_t> & ids, size_t per_layer, const char * does) const {
    std::vector<uint32_t> least(n_layer_, UINT32_MAX);
    for (size_t layer = 0; layer < experts_.size(); ++layer) {
        least[layer % n_layer_] = std::min(least[layer % n_layer_], experts_[layer]);
    }
    for (size_t i = 0; i < ids.size(); ++i) {
        const uint32_t n = least[i / per_layer % n_layer_];
        require(ids[i] < n, format("the routing %s expert %u; the model has %u in a layer", does, ids[i], n));
    }
}

recorded_routing::recorded_routing(const hobbit_routing & from, std::vector<uint32_t> experts, uint32_t k) :
    experts_(std::move(experts)),
    k_(k),
    n_rows_(from.n_rows),
    n_layer_(from.n_layer),
    depth_(from.predicted == nullptr ? 0 : from.depth),
    n_predicted_(from.predicted == nullptr ? 0 : from.n_predicted) {
    require(n_rows_ > 0 && n_layer_ > 0 && from.ids != nullptr && from.weights != nullptr, "the routing is empty");
    require(from.k == k, format("the routing selects %u experts a token, the model %u", from.k, k));
    const size_t n = n_rows_ * n_layer_ * k;
    ids_.assign(from.ids, from.ids + n);
    weights_.assign(from.weights, from.weights + n);
    check_experts(ids_, k, "names");
    check_distinct(ids_, k);
    require(std::all_of(weights_.begin(), weights_.end(), [](float w) { return std::isfinite(w); }),
            "a router weight of the routing is not a number");
    if (depth_ > 0) {
        require(depth_ <= HOBBIT_MAX_LOOKAHEAD && from.predicted_weights != nullptr && n_predicted_ >= k &&
                    n_predicted_ <= *std::max_element(experts_.begin(), experts_.end()),
                "the predictions of the routing are of no use: at least k experts each, with their weights, at most 4 "
                "layers ahead");
        const size_t m = n_rows_ * n_layer_ * depth_ * n_predicted_;
        predicted_.assign(from.predicted, from.predicted + m);
        predicted_weights_.assign(from.predicted_weights, from.predicted_weights + m);
        // The first layers have nothing before them to be predicted from: whatever stands there is not looked at.
        check_experts(predicted_, (size_t) depth_ * n_predicted_, "predicts");
    }
}

void recorded_routing::begin_pass(uint32_t n_tokens) {
    next_ += n_tokens;
    pass_tokens_ = n_tokens;
}

size_t recorded_routing::row_of(uint32_t i, uint32_t n_tokens) const {
    // next_ counts from 0 and n_tokens <= pass_tokens_ <= next_
    return (next_ - std::min(n_tokens, pass_tokens_) + i) % n_rows_;
}

const uint16_t * recorded_routing::ids(uint32_t layer, uint32_t i, uint32_t n_tokens) const {
    return &ids_[(row_of(i, n_tokens) * n_layer_ + layer % n_layer_) * k_];
}

const float * recorded_routing::weights(uint32_t layer, uint32_t i, uint32_t n_tokens) const {
    return &weights_[(row_of(i, n_tokens) * n_layer_ + layer % n_layer_) * k_];
}

const float * recorded_routing::input(uint32_t layer, uint32_t n_tokens) {
    if (depth_ == 0) {
        return nullptr;
    }
    input_.clear();
    for (uint32_t i = 0; i < n_tokens; ++i) {
        for (uint32_t d = 0; d < depth_; ++d) {
            const size_t to = ((row_of(i, n_tokens) * n_layer_ + (layer + d + 1) % n_layer_) * depth_ + d) * n_predicted_;
            for (uint32_t j = 0; j < n_predicted_; ++j) {
                input_.push_back((float) predicted_[to + j]);
                input_.push_back(predicted_weights_[to + j]);
            }
        }
    }
    return input_.data();
}

bool recorded_routing::shape(uint32_t layer, policy::router_shape & out) {
    if (depth_ == 0 || layer >= experts_.size()) {
        return false;
    }
    out          = {};
    out.n_expert = experts_[layer];
    out.k        = k_;
    out.function = policy::gating::softmax_over_selected;
    return true;
}

bool recorded_routing::logits(uint32_t from, uint32_t to, const float * x, bool, float * out) {
    const uint32_t d = to - from - 1;
    // A trace of fewer layers has no layer before its first: what was recorded there predicts nothing.
    if (d >= depth_ || to % n_layer_ <= d) {
        return false;
    }
    // The order of the experts is what was recorded, whatever their weights say: a ranking may follow a bias.
    constexpr float NOT_PREDICTED = -1e9f;
    std::fill(out, out + experts_[to], NOT_PREDICTED);
    const float * guess = x + (size_t) d * n_predicted_ * 2;
    float         above = INFINITY;
    for (uint32_t j = 0; j < n_predicted_; ++j) {
        float & at = out[(size_t) guess[2 * j]];
        if (at != NOT_PREDICTED) {
            continue;  // a layer of few experts, whose row is longer than there are
        }
        const float logit = std::log(std::max(guess[2 * j + 1], 1e-9f));
        above             = std::min(logit, std::nextafter(above, -INFINITY));
        at                = above;
    }
    return true;
}

const float * recorded_routing::bias(uint32_t) { return nullptr; }

const float * recorded_routing::selection_bias(uint32_t) { return nullptr; }

}  // namespace hobbit
