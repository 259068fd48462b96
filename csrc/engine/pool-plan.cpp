#include "pool-plan.h"

#include "../base/error.h"
#include "../policy/precision.h"

#include <algorithm>

namespace hobbit {

static uint32_t streaming_slots(const expert_index & index) {
    // Two let a read run under a product; more keep the queue deep when slices are small.
    return index.max_segment > (8u << 20) ? 2 : 4;
}

static uint64_t all_experts(const expert_index & index) {
    uint64_t n = 0;
    for (const auto & layer : index.layers()) {
        n += layer.n_expert;
    }
    return n;
}

uint64_t pool_min(const expert_index & index) {
    return index.n_expert_used * index.max_slot[0] + streaming_slots(index) * index.max_segment;
}

uint64_t pool_max(const expert_index & index, const hobbit_params & params) {
    const auto rule = (policy::precision_rule) params.precision_rule;
    const bool low  = index.has_low && policy::uses_low(rule) && !policy::high_serves_low(rule);
    return all_experts(index) * (index.max_slot[0] + (low ? index.max_slot[1] : 0)) +
           streaming_slots(index) * index.max_segment;
}

pool_plan plan_pool(const expert_index & index, const hobbit_params & params, uint64_t bytes) {
    const uint64_t floor = pool_min(index);
    if (bytes < floor) {
        fail(HOBBIT_ERR_BUDGET, format("an expert pool of %s is too small: this model needs at least %s",
                                       human_bytes(bytes).c_str(), human_bytes(floor).c_str()));
    }
    pool_plan plan;
    plan.n_stream            = streaming_slots(index);
    plan.stream_bytes        = plan.n_stream * index.max_segment;
    plan.cache.n_layer       = (uint32_t) index.layers().size();
    plan.cache.n_expert      = index.n_expert;
    plan.cache.k             = index.n_expert_used;
    plan.cache.layer_experts = index.layer_experts();
    plan.cache.slot_bytes[0] = index.max_slot[0];
    plan.cache.slot_bytes[1] = index.max_slot[1];
    bytes -= plan.stream_bytes;

    const uint64_t n_experts = all_experts(index);
    const uint64_t k         = index.n_expert_used;
    uint64_t       high      = std::min(n_experts, bytes / index.max_slot[0]);
    uint64_t       low       = 0;
    const auto     rule      = (policy::precision_rule) params.precision_rule;
    const bool     with_low  = index.has_low && policy::uses_low(rule) && params.low_share > 0.0f;
    if (with_low && !(high == n_experts && policy::high_serves_low(rule))) {
        // The share that was asked for, but enough for a layer's k low copies, which would be streamed otherwise; and always
        // room for a layer's k experts in high precision.
        low  = std::max<uint64_t>((uint64_t) ((double) bytes * params.low_share) / index.max_slot[1], k);
        low  = std::min({ low, n_experts, (bytes - k * index.max_slot[0]) / index.max_slot[1] });
        high = std::min(n_experts, (bytes - low * index.max_slot[1]) / index.max_slot[0]);
        // What is left where every expert has a high slot.
        low = high == n_experts ? std::min(n_experts, (bytes - high * index.max_slot[0]) / index.max_slot[1]) : low;
    }
    plan.cache.n_slots[0] = (uint32_t) high;
    plan.cache.n_slots[1] = (uint32_t) low;
    plan.holds_all_high   = high == n_experts;
    plan.with_low         = with_low;
    return plan;
}

}  // namespace hobbit
