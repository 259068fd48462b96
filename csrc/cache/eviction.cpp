#include "eviction.h"

#include "../hobbit.h"

#include <algorithm>

namespace hobbit {

// T, of a sequence that has begun.
static float tokens(const eviction_context & now) { return (float) std::max(now.token, 1u); }

static float layers_ahead(uint32_t layer, const eviction_context & now) {
    return (float) ((layer + now.n_layer - now.layer) % now.n_layer);
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
    const bool recent = use.last_token != 0 && use.last_token + 1 >= now.token;
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
    return now.discount[distance] * (RECENT_TOTAL * use.recent + SEEN * seen + RATE_TOTAL * use.rate);
}

eviction_rule find_eviction_rule(int number) {
    switch (number) {
        case HOBBIT_EVICT_LRU:
            return priority_lru;
        case HOBBIT_EVICT_LFU:
            return priority_lfu;
        case HOBBIT_EVICT_HOBBIT:
            return priority_hobbit;
        case HOBBIT_EVICT_LCU:
            return priority_lcu;
        case HOBBIT_EVICT_FORESIGHT:
            return priority_foresight;
        default:
            return nullptr;
    }
}

}  // namespace hobbit
