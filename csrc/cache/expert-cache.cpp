#include "expert-cache.h"

namespace hobbit {

expert_cache::expert_cache(const cache_shape & shape, std::byte * pool, const eviction_rule & rule) :
    shape_(shape),
    rule_(rule),
    table_((size_t) shape.n_layer * shape.n_expert * 2, nullptr),
    uses_((size_t) shape.n_layer * shape.n_expert) {
    for (int p = 0; p < 2; ++p) {
        slots_[p] = std::make_unique<cache_entry[]>(shape.n_slots[p]);
        for (uint32_t i = 0; i < shape.n_slots[p]; ++i) {
            cache_entry & e = slots_[p][i];
            e.precision     = (uint8_t) p;
            e.data          = pool;
            pool += shape.slot_bytes[p];
        }
        for (uint32_t i = shape.n_slots[p]; i > 0; --i) {
            free_[p].push_back(&slots_[p][i - 1]);
        }
    }
    if (is_split(0)) {
        share_ = split_slots(rule.split, shape.n_layer, shape.n_expert, shape.k, shape.n_slots[0]);
        taken_.assign(shape.n_layer, 0);
        ledger_ = rule.make_ledger == nullptr ? nullptr : rule.make_ledger(share_, shape.n_expert);
    }
}

float expert_cache::priority(const cache_entry & e, const eviction_context & now) const {
    if (ledger_ && e.precision == 0) {
        return ledger_->priority(e.layer, e.expert);
    }
    return rule_.priority(uses_[(size_t) e.layer * shape_.n_expert + e.expert], e.layer, now);
}

cache_entry * expert_cache::victim(uint32_t layer, int precision, const eviction_context & now) {
    // A scan of all slots: 1 to 2 us for 600 of them, against 500 us for the read that follows.
    cache_entry * best           = nullptr;
    float         best_priority  = 0.0f;
    bool          best_protected = true;
    const bool    same_layer     = is_split(precision);
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        cache_entry * e = &slots_[precision][i];
        if (e->now != cache_entry::state::resident || e->pins > 0 || (same_layer && e->layer != layer)) {
            continue;
        }
        const bool is_protected = e->protected_until >= pass;
        if (best != nullptr && is_protected && !best_protected) {
            continue;
        }
        const float p = priority(*e, now);
        if (best == nullptr || is_protected < best_protected || p < best_priority ||
            (p == best_priority && e->tick < best->tick)) {
            best           = e;
            best_priority  = p;
            best_protected = is_protected;
        }
    }
    return best;
}

cache_entry * expert_cache::insert(uint32_t layer, uint32_t expert, int precision, const eviction_context & now,
                                   void (*evicted)(void *, const cache_entry &), void * ctx, bool ahead) {
    cache_entry * e     = nullptr;
    const bool    split = is_split(precision);
    if (!free_[precision].empty() && (!split || taken_[layer] < share_[layer])) {
        e = free_[precision].back();
        free_[precision].pop_back();
    } else {
        e = victim(layer, precision, now);
        if (e == nullptr) {
            return nullptr;
        }
        if (evicted != nullptr) {
            evicted(ctx, *e);
        }
        leave(e);
    }
    if (split) {
        taken_[layer]++;
    }
    if (ledger_ && precision == 0) {
        ledger_->inserted(layer, expert, ahead);
    }
    e->layer           = (uint16_t) layer;
    e->expert          = (uint16_t) expert;
    e->now             = cache_entry::state::in_flight;
    e->tick            = ++clock_;
    e->protected_until = 0;
    e->prefetched      = false;
    e->reading         = 0;
    e->bytes           = 0;
    e->cancel.store(false, std::memory_order_relaxed);
    e->demanded.store(false, std::memory_order_relaxed);
    e->parts.store(0, std::memory_order_relaxed);
    table_[index(layer, expert, precision)] = e;
    return e;
}

// What lies in the slot is not there any more.
void expert_cache::leave(cache_entry * e) {
    table_[index(e->layer, e->expert, e->precision)] = nullptr;
    if (is_split(e->precision)) {
        taken_[e->layer]--;
    }
    if (ledger_ && e->precision == 0) {
        ledger_->evicted(e->layer, e->expert);
    }
}

void expert_cache::fulfil(cache_entry * e) { e->now = cache_entry::state::resident; }

void expert_cache::abandon(cache_entry * e) { drop(e); }

void expert_cache::drop(cache_entry * e) {
    leave(e);
    e->now             = cache_entry::state::absent;
    e->protected_until = 0;
    e->prefetched      = false;
    free_[e->precision].push_back(e);
}

void expert_cache::reset_uses() {
    for (use_record & use : uses_) {
        use.last_token = use.uses = use.high_uses = use.low_uses = 0;
    }
}

uint32_t expert_cache::available(int precision) const {
    uint32_t n = 0;
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        const cache_entry & e = slots_[precision][i];
        n += e.now == cache_entry::state::absent || (e.now == cache_entry::state::resident && e.pins == 0);
    }
    return n;
}

uint32_t expert_cache::resident(int precision) const {
    uint32_t n = 0;
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        n += slots_[precision][i].now == cache_entry::state::resident;
    }
    return n;
}

}  // namespace hobbit
