// What is read before the router asks for it.
#include "expert-store.h"

#include <algorithm>

namespace hobbit {

// Prefetches of this layer that the router did not choose: the disk has better to do.
void expert_store::drop_stale_prefetches(uint32_t layer, const std::vector<expert_want> & wants) {
    const auto chosen = [&wants](const cache_entry * e) {
        return std::any_of(wants.begin(), wants.end(), [e](const expert_want & w) { return w.entry == e; });
    };
    const auto over = [&](cache_entry * e) {
        if (e->now != cache_entry::state::in_flight || !e->prefetched) {
            return true;
        }
        if (e->layer != layer || chosen(e)) {
            return false;
        }
        drop_prefetch(*e);
        return true;
    };
    prefetching_.erase(std::remove_if(prefetching_.begin(), prefetching_.end(), over), prefetching_.end());
}

void expert_store::drop_prefetch(cache_entry & entry) {
    hobbit_counts & c = counts_[entry.layer];
    entry.cancel.store(true, std::memory_order_relaxed);
    for (const io_request & r : io_->withdraw(&entry)) {
        entry.reading &= ~(1u << r.part);
        entry.bytes += r.done;
        c.bytes_prefetch += r.done;
    }
    c.prefetches_wasted++;
    c.bytes_wasted += entry.bytes;
    entry.prefetched = false;
    if (entry.reading == 0 && entry.pins == 0) {
        cache_->remove(&entry);
    }
}

void expert_store::begin_prefetch(cache_entry & entry) {
    entry.prefetched = true;
    counts_[entry.layer].prefetches++;
    prefetching_.push_back(&entry);
}

// A prefetch that was cancelled and is waiting for its last running read to end: part of it will never arrive.
bool expert_store::given_up(const cache_entry & entry) {
    return entry.now == cache_entry::state::in_flight && entry.cancel.load(std::memory_order_relaxed) &&
           !entry.demanded.load(std::memory_order_relaxed);
}

uint32_t expert_store::prefetch(uint32_t layer, uint32_t passes_ahead, const std::vector<expert_want> & predicted) {
    std::lock_guard<std::mutex>      lock(mutex_);
    std::vector<cache_entry *>       started;
    std::vector<const expert_want *> absent;
    uint32_t                         room[N_PRECISION] = { 0, 0 };
    const auto slot_of = [this](const expert_want & w) { return w.need == policy::need::low && !high_serves_all() ? 1 : 0; };
    uint32_t   n_missing = 0;
    // First protect all that is there, so that making room for the rest cannot evict it.
    for (const expert_want & w : predicted) {
        if (w.need <= policy::need::skip) {
            continue;
        }
        cache_entry * high    = cache_->find(layer, w.expert, 0);
        cache_entry * low     = cache_->find(layer, w.expert, 1);
        const bool    is_low  = w.need == policy::need::low;
        const bool    by_high = !is_low || (now_.high_serves_low && high != nullptr);
        cache_entry * have    = by_high ? high : low;
        if (have == nullptr) {
            n_missing++;
            absent.push_back(&w);
            room[slot_of(w)]++;
            continue;
        }
        have->protected_until = cache_->pass + passes_ahead;
        if (given_up(*have)) {
            n_missing++;
            have->cancel.store(false, std::memory_order_relaxed);
            have->bytes = 0;  // what was read before is counted as wasted
            begin_prefetch(*have);
            started.push_back(have);
        }
    }
    for (int p = 0; p < N_PRECISION; ++p) {
        // Never more than half of what could be evicted: the running layer and the next one need room too.
        room[p] = std::min(room[p], cache_->available(p) / 2);
        cache_->make_room(p, room[p] - std::min(room[p], cache_->n_free(p)), now_, true);
    }
    for (const expert_want * w : absent) {
        const int p = slot_of(*w);
        if (room[p] == 0) {
            continue;
        }
        room[p]--;
        cache_entry * e = cache_->insert(layer, w->expert, p, now_, true);
        if (e != nullptr) {
            inserted_[p] += cache_->shape().slot_bytes[p];
            e->protected_until = cache_->pass + passes_ahead;
            begin_prefetch(*e);
            started.push_back(e);
        }
    }
    note_asked(false, layer);
    std::vector<io_request> requests;
    for (uint32_t part = 0; part < (uint32_t) index_.layers()[layer].projections.size(); ++part) {
        for (cache_entry * e : started) {
            if (missing(*e, part)) {
                request_part(*e, part, requests);
            }
        }
    }
    put_warming_behind(requests);
    io_->prefetch(requests);
    return n_missing;
}

}  // namespace hobbit
