// The expert cache: a fixed pool of slots and what lies in them.
//
// A copy of an expert (layer, expert, precision) is in one of these states:
//   1. absent                                            insert() -> 2
//   2. in flight: has a slot, reads are running          fulfil() -> 3, remove() -> 1
//   3. resident                                          evicted by insert() of another, or remove() -> 1
// In 2 and 3 it can be pinned (counted): a pinned copy is never evicted. An in-flight copy is never evicted either.
// A copy that was predicted is protected until the layer has passed: it is evicted only when nothing else can be, and never for what is
// only predicted as well.
//
// High and low precision copies have slots of their own, since their sizes differ: high ones from the beginning of the pool, low ones
// from its end, and the border between them moves (add_slot, take_slot). Within a precision the entry of lowest priority goes
// (eviction.h), ties by the clock of this cache: least recently used first. A rule that splits the high-precision slots among
// the layers evicts within the layer once that has all of its share.
//
// Not thread-safe: the expert store holds its lock around every call. `data` and `parts` of a pinned entry may be read
// without it.
#pragma once

#include "../base/memory.h"
#include "eviction.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <vector>

namespace hobbit {

struct cache_entry {
    enum class state : uint8_t { absent, in_flight, resident };

    uint16_t              layer           = 0;
    uint16_t              expert          = 0;
    uint8_t               precision       = 0;
    state                 now             = state::absent;
    std::byte *           data            = nullptr;  // the slot
    uint32_t              pins            = 0;
    uint64_t              tick            = 0;      // last touch by the cache's clock
    uint64_t              protected_until = 0;      // layer passes (expert_cache::pass) up to which a prediction protects it
    bool                  prefetched      = false;  // read ahead and not yet asked for
    uint32_t              reading         = 0;      // bit per projection whose read is queued or running
    uint64_t              bytes           = 0;      // read so far for this entry
    std::atomic<bool>     cancel { false };         // in flight: the read is not wanted any more
    std::atomic<bool>     demanded { false };       // in flight: somebody waits
    std::atomic<uint32_t> parts { 0 };              // bit per projection that is whole
};

struct cache_shape {
    uint32_t n_layer       = 0;
    uint32_t n_expert      = 0;
    uint32_t n_slots[2]    = { 0, 0 };  // by precision
    uint64_t slot_bytes[2] = { 0, 0 };
    uint64_t bytes         = 0;  // of the pool; 0: what the slots take
    // For rules that split the slots: experts of a token, and of each layer.
    uint32_t              k = 0;
    std::vector<uint32_t> layer_experts {};   // empty: n_expert each
    bool                  simulated = false;  // there is no memory behind the pool: nothing is copied
};

class expert_cache {
  public:
    // `on_evict`: told of each entry whose slot is about to be used for another.
    expert_cache(const cache_shape & shape, std::byte * pool, const eviction_rule & rule,
                 std::function<void(const cache_entry &)> on_evict = {});

    // In flight or resident; NULL when absent. Does not count as a use.
    cache_entry * find(uint32_t layer, uint32_t expert, int precision) { return table_[index(layer, expert, precision)]; }

    // Absent -> in flight, in a free slot or in that of the evictable entry of lowest priority. NULL when there is
    // none. `ahead`: before its use, for which nothing goes that was predicted as well.
    cache_entry * insert(uint32_t layer, uint32_t expert, int precision, const eviction_context & now, bool ahead = false);
    // Evicts the `n` entries of lowest priority in one scan, fewer if that is all that may go: for so many calls of insert(). Not for rules
    // that split the slots, whose insert() knows where room has to be.
    void make_room(int precision, uint32_t n, const eviction_context & now, bool ahead = false);
    void fulfil(cache_entry * entry);
    // In flight or resident, not pinned: gives the slot back.
    void remove(cache_entry * entry);

    void pin(cache_entry * entry) {
        n_busy_[entry->precision] += entry->pins++ == 0 && entry->now == cache_entry::state::resident;
    }

    void unpin(cache_entry * entry) {
        n_busy_[entry->precision] -= --entry->pins == 0 && entry->now == cache_entry::state::resident;
    }

    void touch(cache_entry * entry) { entry->tick = ++clock_; }

    // The pool may use `bytes` from now on, at most the room it was made with. Slots beyond that go by take_slot().
    void set_limit(uint64_t bytes);

    uint64_t limit() const { return limit_; }

    uint64_t used_bytes() const {
        return shape_.n_slots[0] * shape_.slot_bytes[0] + shape_.n_slots[1] * shape_.slot_bytes[1];
    }

    std::byte * slot(int precision, uint32_t i) const {
        return precision == 0 ? pool_ + i * shape_.slot_bytes[0] : pool_ + room_ - (i + 1) * shape_.slot_bytes[1];
    }

    // One slot more, at the border: slot(precision, n_slots). False when there is no room below the limit, or a slot for every expert.
    bool can_add(int precision) const {
        return used_bytes() + shape_.slot_bytes[precision] <= limit_ && shape_.n_slots[precision] < n_experts_;
    }

    bool add_slot(int precision);
    // One slot fewer: the one at the border. What lies there takes the place of the evictable entry of lowest priority. False when
    // nothing can go: it is pinned or in flight. Not for rules that split the slots.
    bool take_slot(int precision, const eviction_context & now);

    // The router selected it in high precision: for rules with a ledger. Before room is made for it.
    void used(uint32_t layer, uint32_t expert, bool resident) {
        if (ledger_) {
            ledger_->used(layer, expert, resident);
        }
    }

    use_record & use(uint32_t layer, uint32_t expert) { return uses_[(size_t) layer * shape_.n_expert + expert]; }

    // A new sequence: use records are cleared, contents stay.
    void reset_uses();

    // The next insert() evicts: no slot is free, and there are fewer than experts.
    bool full(int precision) const {
        return shape_.n_slots[precision] > 0 && free_[precision].empty() && shape_.n_slots[precision] < n_experts_;
    }

    // Mean priority of the `n` entries that would be evicted next.
    float margin(int precision, uint32_t n, const eviction_context & now) const;

    // Copies that could be inserted now: free slots and evictable entries.
    uint32_t available(int precision) const { return shape_.n_slots[precision] - n_busy_[precision]; }

    uint32_t resident(int precision) const;

    // Calls f(entry) for all slots.
    template <typename F>
    void for_each(F && f) {
        for (int p = 0; p < 2; ++p) {
            std::for_each(slots_[p].get(), slots_[p].get() + shape_.n_slots[p], f);
        }
    }

    uint32_t n_free(int precision) const { return (uint32_t) free_[precision].size(); }

    const cache_shape & shape() const { return shape_; }

    uint64_t n_experts() const { return n_experts_; }

    // Number of the running layer pass; predictions protect up to one of these.
    uint64_t pass = 1;

  private:
    size_t index(uint32_t layer, uint32_t expert, int precision) const {
        return ((size_t) layer * shape_.n_expert + expert) * 2 + (size_t) precision;
    }

    // What may be evicted: the lowest goes first.
    struct rank {
        bool          is_protected = false;
        float         priority     = 0.0f;
        uint64_t      tick         = 0;
        cache_entry * entry        = nullptr;

        bool operator<(const rank & o) const {
            return is_protected != o.is_protected ? o.is_protected
                   : priority != o.priority       ? priority < o.priority
                                                  : tick < o.tick;
        }
    };

    // The `n` lowest, of one layer or (layer < 0) of all, in lowest_.
    void          find_lowest(int precision, uint32_t n, int64_t layer, const eviction_context & now);
    cache_entry * victim(uint32_t layer, int precision, const eviction_context & now);
    void          evict(cache_entry * entry);
    void          leave(cache_entry * entry);
    float         priority(const cache_entry & entry, const eviction_context & now) const;

    bool is_split(int precision) const { return precision == 0 && rule_.split != slot_split::none; }

    cache_entry * make_slot(int precision);

    cache_shape                              shape_;
    std::byte *                              pool_;
    uint64_t                                 room_;
    uint64_t                                 limit_;
    eviction_rule                            rule_;
    std::function<void(const cache_entry &)> on_evict_;
    uint64_t                                 n_experts_;  // of all layers, which may have different numbers
    std::vector<cache_entry *>               table_;
    std::vector<use_record>                  uses_;
    std::unique_ptr<cache_entry[]>           slots_[2];  // one per slot that there can be, for ever; `absent` ones are free
    std::vector<cache_entry *>               free_[2];
    uint32_t                                 n_busy_[2] = { 0, 0 };  // in flight, or resident and pinned
    std::vector<rank>                        lowest_;                // scratch of find_lowest()
    std::vector<uint32_t>                    share_;                 // slots of each layer, when they are split
    std::vector<uint32_t>                    taken_;                 // and how many of these are taken
    std::unique_ptr<eviction_ledger>         ledger_;
    uint64_t                                 clock_ = 0;
};

}  // namespace hobbit
