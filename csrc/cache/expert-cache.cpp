#include "expert-cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace hobbit {

expert_cache::expert_cache(const cache_shape & shape, std::byte * pool, const eviction_rule & rule,
                           std::function<void(const cache_entry &)> on_evict) :
    shape_(shape),
    pool_(pool),
    room_(std::max(shape.bytes, used_bytes())),
    limit_(room_),
    rule_(rule),
    on_evict_(std::move(on_evict)),
    n_experts_(shape.layer_experts.empty()
                   ? (uint64_t) shape.n_layer * shape.n_expert
                   : std::accumulate(shape.layer_experts.begin(), shape.layer_experts.end(), (uint64_t) 0)),
    table_((size_t) shape.n_layer * shape.n_expert * 2, nullptr),
    uses_((size_t) shape.n_layer * shape.n_expert) {
    for (int p = 0; p < 2; ++p) {
        const uint32_t n    = shape.n_slots[p];
        const uint64_t most = shape.slot_bytes[p] == 0 ? n : std::min<uint64_t>(n_experts_, room_ / shape.slot_bytes[p]);
        slots_[p]           = std::make_unique<cache_entry[]>(std::max<uint64_t>(n, most));
        shape_.n_slots[p]   = 0;
        for (uint32_t i = 0; i < n; ++i) {
            make_slot(p);
        }
        for (uint32_t i = n; i > 0; --i) {
            free_[p].push_back(&slots_[p][i - 1]);
        }
    }
    if (is_split(0)) {
        share_ = split_slots(rule.split, shape.layer_experts, shape.k, shape.n_slots[0]);
        taken_.assign(shape.n_layer, 0);
        ledger_ = rule.make_ledger == nullptr ? nullptr : rule.make_ledger(share_, shape.n_expert);
    }
}

// The next slot at the border.
cache_entry * expert_cache::make_slot(int p) {
    const uint32_t i = shape_.n_slots[p]++;
    cache_entry &  e = slots_[p][i];
    e.precision      = (uint8_t) p;
    e.now            = cache_entry::state::absent;
    e.data           = slot(p, i);
    return &e;
}

void expert_cache::set_limit(uint64_t bytes) { limit_ = std::min(bytes, room_); }

bool expert_cache::add_slot(int p) {
    if (!can_add(p)) {
        return false;
    }
    free_[p].push_back(make_slot(p));
    return true;
}

bool expert_cache::take_slot(int p, const eviction_context & now) {
    if (shape_.n_slots[p] == 0) {
        return false;
    }
    cache_entry * last = &slots_[p][shape_.n_slots[p] - 1];
    if (last->now == cache_entry::state::in_flight || last->pins > 0) {
        return false;
    }
    if (last->now == cache_entry::state::absent) {
        free_[p].erase(std::find(free_[p].begin(), free_[p].end(), last));
        shape_.n_slots[p]--;
        return true;
    }
    cache_entry * to = nullptr;
    if (free_[p].empty()) {
        to = victim(0, p, now);
        evict(to);
        to->now = cache_entry::state::absent;
    } else {
        to = free_[p].back();
        free_[p].pop_back();
    }
    if (to != last) {
        to->layer           = last->layer;
        to->expert          = last->expert;
        to->now             = cache_entry::state::resident;
        to->tick            = last->tick;
        to->protected_until = last->protected_until;
        to->prefetched      = last->prefetched;
        to->reading         = 0;
        to->bytes           = last->bytes;
        to->cancel.store(false, std::memory_order_relaxed);
        to->demanded.store(last->demanded.load(std::memory_order_relaxed), std::memory_order_relaxed);
        to->parts.store(last->parts.load(std::memory_order_relaxed), std::memory_order_relaxed);
        if (!shape_.simulated) {
            memcpy(to->data, last->data, shape_.slot_bytes[p]);
        }
        table_[index(to->layer, to->expert, p)] = to;
        last->now                               = cache_entry::state::absent;
        last->protected_until                   = 0;
        last->prefetched                        = false;
    }
    shape_.n_slots[p]--;
    return true;
}

float expert_cache::priority(const cache_entry & e, const eviction_context & now) const {
    if (ledger_ && e.precision == 0) {
        return ledger_->priority(e.layer, e.expert);
    }
    const use_record & use = uses_[(size_t) e.layer * shape_.n_expert + e.expert];
    const float        p   = rule_.priority(use, e.layer, now);
    if (!rule_.by_cost || now.low_cost == 0.0f) {
        return p;
    }
    // What its absence would cost at the next use. A low copy serves the low needs, if no high copy does; a high copy the high ones, and
    // the low ones where the rule lets it and no low copy is there.
    const bool  twice  = table_[index(e.layer, e.expert, 1 - e.precision)] != nullptr;
    const float of_low = p * (1.0f - use.high_share) * now.low_cost;
    if (e.precision == 1) {
        return twice && now.high_serves_low ? 0.0f : of_low;
    }
    return p * use.high_share + (twice || !now.high_serves_low ? 0.0f : of_low);
}

float expert_cache::margin(int precision, uint32_t n, const eviction_context & now) const {
    std::vector<float> priorities;
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        const cache_entry & e = slots_[precision][i];
        if (e.now == cache_entry::state::resident && e.pins == 0) {
            priorities.push_back(priority(e, now));
        }
    }
    n = std::min(n, (uint32_t) priorities.size());
    if (n == 0) {
        return 0.0f;
    }
    std::nth_element(priorities.begin(), priorities.begin() + (n - 1), priorities.end());
    return std::accumulate(priorities.begin(), priorities.begin() + n, 0.0f) / (float) n;
}

void expert_cache::find_lowest(int precision, uint32_t n, int64_t layer, const eviction_context & now) {
    // A scan of all slots: 1 to 2 us for 600 of them, against 500 us for the read that follows.
    lowest_.clear();
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        cache_entry * e = &slots_[precision][i];
        if (e->now != cache_entry::state::resident || e->pins > 0 || (layer >= 0 && e->layer != layer)) {
            continue;
        }
        rank       r { e->protected_until >= pass, 0.0f, e->tick, e };
        const bool full = lowest_.size() == n;
        if (full && r.is_protected && !lowest_.front().is_protected) {
            continue;
        }
        r.priority = priority(*e, now);
        if (full && !(r < lowest_.front())) {
            continue;
        }
        if (full) {
            std::pop_heap(lowest_.begin(), lowest_.end());
            lowest_.pop_back();
        }
        lowest_.push_back(r);
        std::push_heap(lowest_.begin(), lowest_.end());
    }
}

cache_entry * expert_cache::victim(uint32_t layer, int precision, const eviction_context & now) {
    find_lowest(precision, 1, is_split(precision) ? (int64_t) layer : -1, now);
    return lowest_.empty() ? nullptr : lowest_.front().entry;
}

void expert_cache::make_room(int precision, uint32_t n, const eviction_context & now, bool ahead) {
    if (n == 0 || is_split(precision)) {
        return;
    }
    find_lowest(precision, n, -1, now);
    for (const rank & r : lowest_) {
        if (ahead && r.is_protected) {
            continue;
        }
        if (on_evict_) {
            on_evict_(*r.entry);
        }
        remove(r.entry);
    }
}

cache_entry * expert_cache::insert(uint32_t layer, uint32_t expert, int precision, const eviction_context & now,
                                   bool ahead) {
    cache_entry * e     = nullptr;
    const bool    split = is_split(precision);
    if (!free_[precision].empty() && (!split || taken_[layer] < share_[layer])) {
        e = free_[precision].back();
        free_[precision].pop_back();
    } else {
        e = victim(layer, precision, now);
        if (e == nullptr || (ahead && e->protected_until >= pass)) {
            return nullptr;
        }
        evict(e);
    }
    if (split) {
        taken_[layer]++;
    }
    if (ledger_ && precision == 0) {
        ledger_->inserted(layer, expert, ahead);
    }
    e->layer  = (uint16_t) layer;
    e->expert = (uint16_t) expert;
    e->now    = cache_entry::state::in_flight;
    n_busy_[precision]++;
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

void expert_cache::evict(cache_entry * e) {
    if (on_evict_) {
        on_evict_(*e);
    }
    leave(e);
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

void expert_cache::fulfil(cache_entry * e) {
    e->now = cache_entry::state::resident;
    n_busy_[e->precision] -= e->pins == 0;
}

void expert_cache::remove(cache_entry * e) {
    leave(e);
    n_busy_[e->precision] -= e->now == cache_entry::state::in_flight;
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

uint32_t expert_cache::resident(int precision) const {
    uint32_t n = 0;
    for (uint32_t i = 0; i < shape_.n_slots[precision]; ++i) {
        n += slots_[precision][i].now == cache_entry::state::resident;
    }
    return n;
}

}  // namespace hobbit
