// What the property tests (tests/python/test_properties.py) see of the core: cache, eviction, precision, index and pool
// plan as C functions over plain numbers. A library of its own; nothing of this is in libhobbit.
#include "base/error.h"
#include "cache/expert-cache.h"
#include "engine/pool-plan.h"
#include "io/expert-index.h"
#include "policy/precision.h"

#include <cstring>

using namespace hobbit;

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- cache and eviction ------------------------------------------------------------------------------------------------

namespace {

// Slots of no bytes: their numbers are what counts.
struct cache {
    cache(const cache_shape & shape, const eviction_rule & rule) :
        core(shape, nullptr, rule, [this](const cache_entry & e) { gone = { e.layer, e.expert }; }) {}

    struct {
        int32_t layer = -1, expert = -1;
    } gone;  // what was evicted last

    expert_cache     core;
    eviction_context now;
};

expert_cache & core(void * c) { return ((cache *) c)->core; }

}  // namespace

EXPORT void * t_cache_new(uint32_t n_layer, uint32_t n_expert, uint32_t high, uint32_t low, int rule, const float * w,
                          float low_cost) {
    cache_shape shape;
    shape.n_layer    = n_layer;
    shape.n_expert   = n_expert;
    shape.n_slots[0] = high;
    shape.n_slots[1] = low;
    shape.layer_experts.assign(n_layer, n_expert);
    auto * c        = new cache(shape, *find_eviction_rule(rule));
    c->now.n_layer  = n_layer;
    c->now.low_cost = low_cost;
    c->now.weights  = { w[0], w[1], w[2], w[3] };
    return c;
}

EXPORT void t_cache_free(void * c) { delete (cache *) c; }

EXPORT void t_cache_now(void * c, uint32_t token, uint32_t layer, uint64_t pass) {
    ((cache *) c)->now.token        = token;
    ((cache *) c)->now.token_before = token - (token > 0);
    ((cache *) c)->now.layer        = layer;
    core(c).pass                    = pass;
}

// 0 absent, 1 in flight, 2 resident.
EXPORT int t_cache_state(void * c, uint32_t layer, uint32_t expert, int p) {
    const cache_entry * e = core(c).find(layer, expert, p);
    return e == nullptr ? 0 : (int) e->now;
}

// 0: no room; 1: a free slot; 2: in the slot of `evicted` (layer, expert).
EXPORT int t_cache_insert(void * c, uint32_t layer, uint32_t expert, int p, int32_t * evicted) {
    auto & gone = ((cache *) c)->gone;
    gone        = {};
    if (core(c).insert(layer, expert, p, ((cache *) c)->now) == nullptr) {
        return 0;
    }
    evicted[0] = gone.layer;
    evicted[1] = gone.expert;
    return gone.layer < 0 ? 1 : 2;
}

// Operations on an entry that is there, by number.
EXPORT void t_cache_do(void * c, int what, uint32_t layer, uint32_t expert, int p, uint64_t value) {
    cache_entry * e = core(c).find(layer, expert, p);
    switch (what) {
        case 0:
            return core(c).fulfil(e);
        case 1:
            return core(c).remove(e);
        case 2:
            return core(c).pin(e);
        case 3:
            return core(c).unpin(e);
        case 4:
            return core(c).touch(e);
        case 5:
            return core(c).remove(e);
        default:
            e->protected_until = value;
    }
}

EXPORT void t_cache_use(void * c, uint32_t layer, uint32_t expert, uint32_t token, uint32_t high, uint32_t low) {
    use_record & use = core(c).use(layer, expert);
    use.last_token   = token;
    use.uses += high + low;
    use.high_uses += high;
    use.low_uses += low;
}

EXPORT void t_cache_reset_uses(void * c) { core(c).reset_uses(); }

EXPORT uint32_t t_cache_available(void * c, int p) { return core(c).available(p); }

EXPORT uint32_t t_cache_resident(void * c, int p) { return core(c).resident(p); }

// `use`: last_token, uses, high_uses, low_uses. `now`: token, layer, n_layer.
EXPORT float t_priority(int rule, const uint32_t * use, uint32_t layer, const uint32_t * now, const float * w, float cost) {
    eviction_context context;
    context.token        = now[0];
    context.token_before = now[0] - (now[0] > 0);  // a token at a time
    context.layer        = now[1];
    context.n_layer      = now[2];
    context.low_cost     = cost;
    context.weights      = { w[0], w[1], w[2], w[3] };
    return find_eviction_rule(rule)->priority({ use[0], use[1], use[2], use[3] }, layer, context);
}

// ---- precision ---------------------------------------------------------------------------------------------------------

EXPORT void t_assess(const float * weights, uint32_t k, int rule, float t1, float t2, float drop, uint32_t most,
                     uint8_t * needs, float * scores) {
    policy::serving how;
    how.rule          = (policy::precision_rule) rule;
    how.t             = { t1, t2 };
    how.drop_fraction = drop;
    how.max_experts   = most;
    policy::assess(weights, k, 0, how, (policy::need *) needs, scores);
}

EXPORT int t_resolve(int rule, int need, int high, int low) {
    return (int) policy::resolve((policy::precision_rule) rule, (policy::need) need, (policy::copy_state) high,
                                 (policy::copy_state) low);
}

// ---- index and pool ----------------------------------------------------------------------------------------------------

// NULL, with status and message, when it fails.
EXPORT void * t_index_new(const char * path, const char * low, int direct, hobbit_error * why) {
    try {
        return new expert_index(path, low, direct != 0);
    } catch (const error & e) {
        fill_error(why, e.status(), e.os_errno(), e.what());
    } catch (const std::exception & e) {
        fill_error(why, HOBBIT_ERR_INTERNAL, 0, e.what());
    }
    return nullptr;
}

EXPORT void t_index_free(void * index) { delete (expert_index *) index; }

// n_block, layers, n_expert, n_expert_used, has_low, bytes_dense, bytes high, low, max_segment, pool_min.
EXPORT void t_index_facts(void * index, uint64_t * out) {
    const auto &   i       = *(expert_index *) index;
    const uint64_t facts[] = { i.n_block,     i.layers().size(), i.n_expert,       i.n_expert_used, i.has_low,
                               i.bytes_dense, i.bytes_total[0],  i.bytes_total[1], i.max_segment,   pool_min(i) };
    memcpy(out, facts, sizeof(facts));
}

// Where an expert's slice of a tensor is: file, offset, bytes, and its room in a slot: offset, bytes. 0: not known.
EXPORT int t_index_find(void * index, const char * tensor, int p, uint32_t expert, uint64_t * out) {
    const auto & i     = *(expert_index *) index;
    const auto   where = i.find(tensor);
    if (where.first < 0) {
        return 0;
    }
    const projection & proj = i.layers()[(size_t) where.first].projections[(size_t) where.second];
    if (proj.source[p].type < 0 || expert >= i.layers()[(size_t) where.first].n_expert) {
        return 0;
    }
    const extent x = proj.source[p].expert(expert);
    out[0]         = x.file;
    out[1]         = x.offset;
    out[2]         = x.bytes;
    out[3]         = proj.slot_offset[p];
    out[4]         = proj.slot_bytes[p];
    return 1;
}

// high, low, streaming slots, bytes; the status.
EXPORT int t_plan(void * index, int rule, float low_share, uint64_t bytes, uint64_t * out) {
    hobbit_params params  = {};
    params.precision_rule = rule;
    params.low_share      = low_share;
    try {
        const pool_plan plan = plan_pool(*(expert_index *) index, params, bytes);
        out[0]               = plan.cache.n_slots[0];
        out[1]               = plan.cache.n_slots[1];
        out[2]               = plan.n_stream;
        out[3]               = plan.bytes();
        out[4]               = plan.holds_all_high;
        return HOBBIT_OK;
    } catch (const error & e) {
        return e.status();
    }
}
