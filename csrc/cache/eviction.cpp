#include "eviction.h"

#include "../hobbit.h"

#include <algorithm>
#include <iterator>
#include <numeric>

namespace hobbit {

// T, of a sequence that has begun.
static float tokens(const eviction_context & now) { return (float) std::max(now.token, 1u); }

static float layers_ahead(uint32_t layer, const eviction_context & now) {
    return (float) (layer >= now.layer ? layer - now.layer : layer + now.n_layer - now.layer);  // both below n_layer
}

float priority_lru(const use_record & use, uint32_t, const eviction_context &) { return (float) use.last_token; }

float priority_lfu(const use_record & use, uint32_t, const eviction_context &) { return (float) use.uses; }

float priority_hobbit(const use_record & use, uint32_t layer, const eviction_context & now) {
    const float t = tokens(now);
    return now.weights.lru * (float) use.last_token / t + now.weights.lfu * (float) use.uses / t +
           now.weights.lhu * (float) use.high_uses / t +
           now.weights.fld * (1.0f - layers_ahead(layer, now) / (float) now.n_layer);
}

float priority_lcu(const use_record & use, uint32_t layer, const eviction_context & now) {
    const float c = ((float) use.high_uses + now.low_cost * (float) use.low_uses) / tokens(now);
    // The last token's pass is the one before for layers still to come, and the running one for layers behind, of which those used
    // in the pass before count as well: they are as near.
    const bool recent = use.last_token != 0 && use.last_token >= now.token_before;
    return recent ? c + 1.0f / (layers_ahead(layer, now) + 0.1f) : c;
}

float priority_foresight(const use_record & use, uint32_t layer, const eviction_context & now) {
    // Found on three real routing traces, where the hit rate is flat around them: half or twice of each costs at most half a point.
    constexpr float RECENT = 0.1f, DELTA = 0.7f, SEEN = 0.85f;
    constexpr float RECENT_TOTAL = RECENT / (1.0f - FORESIGHT_GAMMA * DELTA);
    constexpr float RATE_TOTAL   = (1.0f - SEEN) * FORESIGHT_TOTAL - RECENT_TOTAL;

    const auto     ahead    = (uint32_t) layers_ahead(layer, now);
    const uint32_t distance = ahead == 0 ? now.n_layer : ahead;
    const float    seen     = use.seen[layer > now.layer ? 0 : 1];
    const float    expected = RECENT_TOTAL * use.recent + SEEN * seen + RATE_TOTAL * use.rate;
    const float    by_age   = now.recency > 0.0f ? FORESIGHT_TOTAL / (float) (1 + now.clock - use.used_at) : 0.0f;
    return now.discount[distance] * (expected + now.recency * (by_age - expected));
}

std::vector<uint32_t> split_slots(slot_split split, const std::vector<uint32_t> & experts, uint32_t k, uint32_t n_slots) {
    constexpr size_t N_SHALLOW = 4;
    const auto       n_layer   = (uint32_t) experts.size();
    n_slots                    = std::min(n_slots, std::accumulate(experts.begin(), experts.end(), 0u));
    std::vector<uint32_t> slots(n_layer);
    const auto            fill = [&](uint32_t most) {
        std::transform(experts.begin(), experts.end(), slots.begin(), [&](uint32_t n) { return std::min(n, most); });
        return std::accumulate(slots.begin(), slots.end(), 0u);
    };
    if (split == slot_split::none) {
        fill(n_slots);
        return slots;
    }
    uint32_t taken = fill(k);
    if (taken > n_slots) {
        taken = fill(std::min(k, n_slots / n_layer));
    }
    uint32_t   left = n_slots - taken;
    const auto give = [&](size_t l, uint32_t most) {
        const uint32_t more = std::min({ most, left, experts[l] - slots[l] });
        slots[l] += more;
        left -= more;
    };
    if (split == slot_split::shallow) {
        for (size_t l = 0; l < std::min<size_t>(N_SHALLOW, n_layer); ++l) {
            give(l, left);
        }
    }
    // Evenly over the layers that are not whole; what does not divide goes to the first of them.
    while (left > 0) {
        uint32_t open = 0;
        for (size_t l = 0; l < n_layer; ++l) {
            open += slots[l] < experts[l];
        }
        const uint32_t share = std::max(left / open, 1u);
        for (size_t l = 0; l < n_layer; ++l) {
            give(l, share);
        }
    }
    return slots;
}

// By hobbit_eviction_rule.
static const eviction_rule RULES[] = {
    { priority_lru },                                         // LRU
    { priority_lfu },                                         // LFU
    { priority_hobbit },                                      // HOBBIT
    { priority_lcu },                                         // LCU
    { priority_foresight, slot_split::none, nullptr, true },  // FORESIGHT
    { priority_lru, slot_split::even },                       // LAYER_LRU
    { priority_lru, slot_split::even, make_arc },             // LAYER_ARC
    { priority_lru, slot_split::shallow, make_arc },          // FATE
};

const eviction_rule * find_eviction_rule(int number) {
    return number >= 0 && number < (int) std::size(RULES) ? &RULES[number] : nullptr;
}

}  // namespace hobbit
