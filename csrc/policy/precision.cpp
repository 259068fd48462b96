#include "precision.h"

#include <algorithm>
#include <numeric>

namespace hobbit::policy {

// Selections by falling weight, ties by position; until the thread calls it again. k is small (a few dozen): insertion sort.
static const uint16_t * sort_by_weight(const float * weights, uint32_t k) {
    static thread_local std::vector<uint16_t> order;
    order.resize(k);
    for (uint32_t i = 0; i < k; ++i) {
        uint32_t j = i;
        for (; j > 0 && weights[order[j - 1]] < weights[i]; --j) {
            order[j] = order[j - 1];
        }
        order[j] = (uint16_t) i;
    }
    return order.data();
}

void classify(const float * weights, uint32_t k, thresholds t, need * needs, float * scores) {
    const uint16_t * order = sort_by_weight(weights, k);
    const float      sum   = std::accumulate(weights, weights + k, 0.0f);
    const float      scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    float            s     = 0.0f;
    for (uint32_t i = 0; i < k; ++i) {
        const uint16_t at = order[i];
        needs[at]         = i == 0 || s <= t.t1 ? need::high : s <= t.t2 ? need::low : need::skip;
        if (scores != nullptr) {
            scores[at] = s;
        }
        s += weights[at] * scale;
    }
}

void classify_by_cost(const float * weights, uint32_t k, thresholds t, float sensitivity, need * needs, float * scores) {
    const float sum     = std::accumulate(weights, weights + k, 0.0f);
    const auto  largest = (uint32_t) (std::max_element(weights, weights + k) - weights);
    for (uint32_t i = 0; i < k; ++i) {
        const float g = sum > 0.0f ? weights[i] / sum : 1.0f;
        const float s = 1.0f - sensitivity * g;
        needs[i]      = 1.0f - g > t.t2 && i != largest ? need::skip : s <= t.t1 && t.t1 > 0.0f ? need::high : need::low;
        if (scores != nullptr) {
            scores[i] = s;
        }
    }
}

void classify_drop(const float * weights, uint32_t k, float fraction, need * needs) {
    const float sum     = std::accumulate(weights, weights + k, 0.0f);
    const float limit   = fraction / (float) k * sum;
    const auto  largest = (uint32_t) (std::max_element(weights, weights + k) - weights);
    for (uint32_t i = 0; i < k; ++i) {
        needs[i] = i == largest || weights[i] >= limit ? need::high : need::skip;
    }
}

void keep_largest(const float * weights, uint32_t k, uint32_t n, need * needs) {
    const uint16_t * order = sort_by_weight(weights, k);
    for (uint32_t i = n; i < k; ++i) {
        needs[order[i]] = need::never;
    }
}

void classify_popularity(const uint32_t * counts, uint32_t n_expert, float share, need * needs) {
    std::vector<uint32_t> order;
    uint64_t              total = 0;
    for (uint32_t e = 0; e < n_expert; ++e) {
        needs[e] = need::high;
        total += counts[e];
        if (counts[e] > 0) {
            order.push_back(e);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return counts[a] < counts[b]; });
    const double limit = (double) share * (double) total;
    uint64_t     low   = 0;
    for (const uint32_t e : order) {
        low += counts[e];
        if ((double) low > limit) {
            break;
        }
        needs[e] = need::low;
    }
}

void assess(const float * weights, uint32_t k, uint32_t layer, const serving & how, need * needs, float * scores) {
    switch (how.rule) {
        case precision_rule::exact:
            std::fill_n(needs, k, need::high);
            break;
        case precision_rule::miss:
        case precision_rule::weight:
            if (how.sensitivity) {
                classify_by_cost(weights, k, how.t, (*how.sensitivity)[layer], needs, scores);
            } else {
                classify(weights, k, how.t, needs, scores);
            }
            break;
        case precision_rule::drop:
            classify_drop(weights, k, how.drop_fraction, needs);
            break;
        case precision_rule::demand:
            std::fill_n(needs, k, need::low);
            break;
    }
    if (how.limits(k)) {
        keep_largest(weights, k, how.max_experts, needs);
    }
}

action resolve(precision_rule rule, need n, copy_state high, copy_state low) {
    if (n == need::never) {
        return action::skip;
    }
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
            return low == copy_state::resident && rule != precision_rule::drop ? action::use_low : action::skip;
        case need::never:
            return action::skip;
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
        const float s = scores[i] >= 0.0f ? std::min(scores[i], 0.9999f) : 0.0f;  // a broken model's may be NaN
        bins_[(uint32_t) (s * N_BIN)]++;
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
