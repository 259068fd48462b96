#include "precision.h"

#include <algorithm>

namespace hobbit::policy {

void classify(const float * weights, uint32_t k, thresholds t, need * needs, float * scores) {
    // k is small (at most a few dozen): insertion sort of indices on the stack, ties by position.
    constexpr uint32_t MAX_K = 256;
    uint16_t           order[MAX_K];
    k         = std::min(k, MAX_K);
    float sum = 0.0f;
    for (uint32_t i = 0; i < k; ++i) {
        uint32_t j = i;
        for (; j > 0 && weights[order[j - 1]] < weights[i]; --j) {
            order[j] = order[j - 1];
        }
        order[j] = (uint16_t) i;
        sum += weights[i];
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    float       s     = 0.0f;
    for (uint32_t i = 0; i < k; ++i) {
        const uint16_t at = order[i];
        needs[at]         = i == 0 || s <= t.t1 ? need::high : s <= t.t2 ? need::low : need::skip;
        if (scores != nullptr) {
            scores[at] = s;
        }
        s += weights[at] * scale;
    }
}

action resolve(precision_rule rule, need n, copy_state high, copy_state low) {
    if (rule == precision_rule::exact) {
        n = need::high;
    }
    if (rule == precision_rule::weight && n != need::high) {
        if (n == need::skip) {
            return action::skip;
        }
        return low == copy_state::absent ? action::load_low : action::use_low;
    }
    if (high == copy_state::resident) {
        return action::use_high;
    }
    switch (n) {
        case need::high:
            return high == copy_state::in_flight ? action::use_high : action::load_high;
        case need::low:
            if (low == copy_state::resident) {
                return action::use_low;
            }
            if (high == copy_state::in_flight) {
                return action::use_high;
            }
            return low == copy_state::in_flight ? action::use_low : action::load_low;
        case need::skip:
            return low == copy_state::resident ? action::use_low : action::skip;
    }
    return action::load_high;
}

thresholds default_thresholds(uint32_t k) {
    if (k <= 2) {
        return { 0.60f, 0.90f };
    }
    if (k <= 5) {
        return { 0.63f, 0.87f };
    }
    if (k <= 7) {
        return { 0.76f, 0.94f };
    }
    return { 0.80f, 0.95f };
}

void threshold_profile::add(const float * scores, uint32_t k) {
    for (uint32_t i = 0; i < k; ++i) {
        const auto bin = (uint32_t) (std::min(std::max(scores[i], 0.0f), 0.9999f) * N_BIN);
        bins_[bin]++;
    }
    count_ += k;
}

thresholds threshold_profile::at_quantiles(thresholds otherwise) const {
    if (count_ < MIN_COUNT) {
        return otherwise;
    }
    thresholds out  = { 1.0f, 1.0f };
    uint64_t   seen = 0;
    const auto high = (uint64_t) (SHARE_HIGH * (double) count_);
    const auto kept = (uint64_t) (SHARE_KEPT * (double) count_);
    for (uint32_t i = 0; i < N_BIN; ++i) {
        seen += bins_[i];
        const float edge = (float) (i + 1) / N_BIN;
        out.t1           = seen >= high ? std::min(out.t1, edge) : out.t1;
        out.t2           = seen >= kept ? std::min(out.t2, edge) : out.t2;
    }
    return out;
}

}  // namespace hobbit::policy
