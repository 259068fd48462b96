#include "expert-cache.h"

namespace hobbit {

expert_cache::expert_cache(const cache_shape & shape, std::byte * pool, eviction_rule rule) :
    shape_(shape),
    rule_(rule),
    table_((size_t) shape.n_layer * shape.n_expert * 2, nullptr),
    uses_((size_t) shape.n_layer * shape.n_expert) {
    for (int p = 0; p < 2; ++p) {
        for (uint32_t i = 0; i < shape.n_slots[p]; ++i) {
            slots_[p].push_back(std::make_unique<cache_entry>());
            cache_entry * e = slots_[p].back().get();
            e->precision    = (uint8_t) p;
            e->data         = pool;
            pool += shape.slot_bytes[p];
        }
        for (uint32_t i = shape.n_slots[p]; i > 0; --i) {
            free_[p].push_back(slots_[p][i - 1].get());
        }
    }
}

cache_entry * expert_cache::victim(int precision, const eviction_context & now) {
    // A scan of all slots: 0.6 us for 600 of them, against 500 us for the read that follows.
    cache_entry * best           = nullptr;
    float         best_priority  = 0.0f;
    bool          best_protected = true;
    for (const auto & slot : slots_[precision]) {
        cache_entry * e = slot.get();
        if (e->now != cache_entry::state::resident || e->pins > 0) {
            continue;
        }
        const bool is_protected = e->protected_until >= pass;
        if (best != nullptr && is_protected && !best_protected) {
            continue;
        }
        const float priority = rule_(use(e->layer, e->expert), e->layer, now);
        if (best == nullptr || is_protected < best_protected || priority < best_priority ||
            (priority == best_priority && e->tick < best->tick)) {
            best           = e;
            best_priority  = priority;
            best_protected = is_protected;
        }
    }
    return best;
}

cache_entry * expert_cache::insert(uint32_t layer, uint32_t expert, int precision, const eviction_context & now,
                                   void (*evicted)(void *, const cache_entry &), void * ctx) {
    cache_entry * e = nullptr;
    if (!free_[precision].empty()) {
        e = free_[precision].back();
        free_[precision].pop_back();
    } else {
        e = victim(precision, now);
        if (e == nullptr) {
            return nullptr;
        }
        if (evicted != nullptr) {
            evicted(ctx, *e);
        }
        table_[index(e->layer, e->expert, precision)] = nullptr;
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

void expert_cache::fulfil(cache_entry * e) { e->now = cache_entry::state::resident; }

void expert_cache::abandon(cache_entry * e) { drop(e); }

void expert_cache::drop(cache_entry * e) {
    table_[index(e->layer, e->expert, e->precision)] = nullptr;
    e->now                                           = cache_entry::state::absent;
    e->protected_until                               = 0;
    e->prefetched                                    = false;
    free_[e->precision].push_back(e);
}

void expert_cache::reset_uses() {
    for (use_record & use : uses_) {
        use.last_token = use.uses = use.high_uses = use.low_uses = 0;
    }
}

uint32_t expert_cache::available(int precision) const {
    uint32_t n = 0;
    for (const auto & slot : slots_[precision]) {
        n += slot->now == cache_entry::state::absent || (slot->now == cache_entry::state::resident && slot->pins == 0);
    }
    return n;
}

uint32_t expert_cache::resident(int precision) const {
    uint32_t n = 0;
    for (const auto & slot : slots_[precision]) {
        n += slot->now == cache_entry::state::resident;
    }
    return n;
}

}  // namespace hobbit
