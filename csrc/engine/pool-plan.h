// How a pool of so many bytes is divided: streaming slots, high-precision slots, low-precision slots. Pure functions.
#pragma once

#include "../cache/expert-cache.h"
#include "../hobbit.h"
#include "../io/expert-index.h"

namespace hobbit {

struct pool_plan {
    uint32_t    n_stream     = 0;  // slots of index.max_segment bytes, at the beginning of the pool
    uint64_t    stream_bytes = 0;
    cache_shape cache;
    bool        holds_all_high = false;  // every expert has a high-precision slot
    bool        with_low       = false;  // there are low copies and a rule that uses them

    uint64_t cache_bytes() const { return cache.n_slots[0] * cache.slot_bytes[0] + cache.n_slots[1] * cache.slot_bytes[1]; }

    uint64_t bytes() const { return stream_bytes + cache_bytes(); }

    // All slots are for high precision, one for each expert: nothing is ever evicted.
    bool all_high() const { return holds_all_high && cache.n_slots[1] == 0; }
};

// Smallest pool: one token's layer in high precision, and the streaming slots.
uint64_t pool_min(const expert_index & index);
// A pool in which nothing is ever evicted.
uint64_t pool_max(const expert_index & index, const hobbit_params & params);

// Throws HOBBIT_ERR_BUDGET when `bytes` is below pool_min().
pool_plan plan_pool(const expert_index & index, const hobbit_params & params, uint64_t bytes);

}  // namespace hobbit
