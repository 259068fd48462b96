// The expert store: experts come in from disk, stay in the cache, are handed out pinned.
//
// One lock (mutex_) guards the cache and the counters. It is taken before the lock of the I/O pool, never after. Compute
// threads look at arrivals without it, through the atomic `parts` of an entry.
#pragma once

#include "../base/counters.h"
#include "../base/memory.h"
#include "../cache/expert-cache.h"
#include "../cache/foresight.h"
#include "../io/expert-index.h"
#include "../io/io-pool.h"
#include "../policy/precision.h"
#include "../policy/top-k.h"
#include "pool-plan.h"
#include "timeline.h"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace hobbit {

// One expert (at one precision, for the `weight` rule) that a layer pass wants, and what it got.
struct expert_want {
    uint16_t       expert = 0;
    policy::need   need   = policy::need::high;
    uint32_t       count  = 1;  // selections that it serves
    policy::action action = policy::action::skip;
    cache_entry *  entry  = nullptr;  // pinned. NULL with a load: no slot, has to be streamed
    bool           ahead  = false;    // it was read ahead, or is
};

// A read past the cache, for experts that found no slot.
struct stream_slot {
    std::byte *                 room = nullptr;
    std::atomic<std::byte *>    data { nullptr };  // the slice inside `room`
    std::atomic<bool>           ready { false };
    timeline::clock::time_point asked;  // for the time line
    uint32_t                    layer = 0;
    uint32_t                    part  = 0;
    precision                   prec  = precision::high;
};

class expert_store {
  public:
    // Called on a reader thread for each slice that has arrived, before anybody may look at it.
    using arrival_hook = std::function<void(uint32_t layer, uint32_t part, precision p, std::byte * slice)>;

    // Who reads: a simulated disk in a replay.
    using reader_factory = std::function<std::unique_ptr<reader>(const hobbit_params &, reader::handler)>;

    // Throws HOBBIT_ERR_BUDGET when the pool is below pool_min(). `on_arrival` may be empty. With a reader of its own the pool is
    // address space without memory.
    expert_store(const expert_index & index, const hobbit_params & params, uint64_t pool_bytes, arrival_hook on_arrival = {},
                 const reader_factory & make_reader = {});
    ~expert_store();

    // What its tables come to take beside the pool, where that may grow to all experts.
    static uint64_t table_bytes(const expert_index & index, const hobbit_params & params);

    // What the tokens of a batch chose at a layer, before acquire(): for rules that learn from it.
    void observe(uint32_t layer, const int32_t * ids, size_t stride, uint32_t k, uint32_t n_tokens);

    // Before acquire() for the first layer of a batch: moves the sequence's clock, and the border.
    void begin_batch(uint32_t n_tokens);

    // Resolves the wants of a layer pass: pins what is there, requests all that is missing at once, up and gate before down. Never
    // waits.
    void acquire(uint32_t layer, policy::precision_rule rule, std::vector<expert_want> & wants);
    void release(const std::vector<expert_want> & wants);

    // Is projection `part` of a pinned entry there? If so its bytes may be read.
    static bool ready(const cache_entry & entry, uint32_t part) {
        return (entry.parts.load(std::memory_order_acquire) & (1u << part)) != 0;
    }

    // The slice of a projection inside an entry's slot.
    std::byte * slice(const cache_entry & entry, uint32_t part) const;

    // Starts a read into a streaming slot; `slot.ready` tells the end.
    void stream(uint32_t layer, uint32_t expert, precision p, uint32_t part, stream_slot & slot);

    // Read since the statistics were reset, but for what was read in vain.
    uint64_t bytes_needed();

    std::vector<std::unique_ptr<stream_slot>> & stream_slots() { return stream_slots_; }

    // Sleeps until something arrived since `seen` was taken from arrivals(), or until the store failed.
    uint64_t arrivals() const { return arrivals_.load(std::memory_order_acquire); }

    void wait(uint64_t seen);
    // Wakes all waiters.
    void notify();

    // A read failed: nothing can be computed until the error is taken.
    bool failed() const { return failed_.load(std::memory_order_acquire); }

    bool take_error(std::exception_ptr & out);

    // Queues reads of predicted experts that are missing, protects those that are there until the pass after `passes_ahead`
    // more. Returns how many were missing. Never waits.
    uint32_t prefetch(uint32_t layer, uint32_t passes_ahead, const std::vector<expert_want> & predicted);

    void begin_sequence();

    // See hobbit_session_heat. False when the eviction rule keeps no rates.
    bool heat(std::vector<hobbit_heat> & out);
    // See hobbit_session_warm; [layer][n_expert]. Throws HOBBIT_ERR_UNSUPPORTED when the eviction rule keeps no rates.
    void warm(const hobbit_heat * heat);

    // From now on the pool may take `pool_bytes`, at least pool_min() and at most pool_max(). Growing takes effect at once (throws
    // HOBBIT_ERR_NO_MEMORY, then it is as before), shrinking as far as nothing is in use, the rest at the next tokens. Not for eviction
    // rules that split the slots among the layers: HOBBIT_ERR_UNSUPPORTED.
    void resize(uint64_t pool_bytes);

    // Counters.
    void add_counts(uint32_t layer, const hobbit_counts & more);
    void layer_counts(uint32_t layer, hobbit_counts & out);
    void stats(hobbit_stats & out);
    // Selections of each expert of a layer, and those for which it had to be read.
    void expert_uses(uint32_t layer, std::vector<uint64_t> & uses, std::vector<uint64_t> & loads);
    void reset_stats();

    // Where arrivals are noted while it is on. Before the first pass; must outlive the store.
    void set_timeline(timeline * times) { times_ = times; }

    reader & io() { return *io_; }

  private:
    struct expert_id {
        uint16_t layer, expert;
    };

    void        on_read_end(const io_request & request, io_outcome outcome, std::exception_ptr why);
    io_request  read_of(uint32_t layer, uint32_t expert, precision p, uint32_t part, std::byte * room) const;
    void        request_part(cache_entry & entry, uint32_t part, std::vector<io_request> & out);
    bool        high_serves_all() const;
    static bool missing(const cache_entry & entry, uint32_t part);
    static bool given_up(const cache_entry & entry);
    void        begin_prefetch(cache_entry & entry);
    void        resume(cache_entry & entry);
    void        settle(cache_entry & entry);
    void        note_asked(bool demand, uint32_t layer);
    void        note_arrival(hobbit_event_kind kind, uint32_t layer, timeline::clock::time_point asked, uint64_t bytes);
    void        count_hit(cache_entry & entry, bool was_in_flight);
    void        drop_stale_prefetches(uint32_t layer, const std::vector<expert_want> & wants);
    void        drop_prefetch(cache_entry & entry);
    void        move_border();
    void        hand_over_free_slots(int to);
    bool        shrink_to_limit();
    bool        fill_with_high();
    void        restore_low_slots() noexcept;
    bool        take_slot(int precision);
    void        give_back_pages(bool whole_only = false);
    bool        add_slot(int precision);
    uint64_t    add_slots(int precision, uint64_t most);
    void        add_what_fits(int precision, uint64_t most) noexcept;
    static void step_aside(std::unique_lock<std::mutex> & lock);
    uint32_t    fewest(int precision) const;
    void        count_evicted(const cache_entry & entry);
    void        feed_warming();
    void        put_warming_behind(std::vector<io_request> & requests);
    bool        is_warming(const cache_entry & entry) const;
    void        warming_read_end(cache_entry & entry, bool failed);

    struct page_range {
        size_t begin = 0, end = 0;
    };

    const expert_index & index_;
    const hobbit_params  params_;
    const arrival_hook   on_arrival_;
    timeline *           times_ = nullptr;
    // When each layer last asked for reads: ahead, on demand.
    std::vector<timeline::clock::time_point>  asked_[2];
    region                                    pool_;
    address_range                             no_pool_;             // in place of it
    page_range                                taken_[N_PRECISION];  // of slots that are gone, not given back yet
    uint64_t                                  stream_bytes_ = 0;
    std::vector<std::unique_ptr<stream_slot>> stream_slots_;

    std::mutex                    resize_mutex_;  // one at a time; before mutex_, which is given up in between
    std::mutex                    mutex_;
    std::unique_ptr<expert_cache> cache_;
    std::unique_ptr<foresight>    foresight_;  // NULL unless the eviction rule wants it
    std::vector<float>            discount_;   // eviction_context::discount
    std::vector<hobbit_counts>    counts_;     // per layer
    std::vector<uint64_t>         uses_;       // [layer][expert]
    std::vector<uint64_t>         loads_;
    std::vector<cache_entry *>    prefetching_;
    std::vector<expert_id>        to_warm_;  // the next at the end
    std::vector<cache_entry *>    warming_;  // in flight
    uint64_t                      n_warmed_     = 0;
    uint64_t                      bytes_warmed_ = 0;
    eviction_context              now_;
    uint64_t                      n_tokens_              = 0;
    bool                          with_low_              = false;     // pool_plan::with_low
    bool                          all_high_              = false;     // pool_plan::all_high, as far as the limit goes
    bool                          border_moves_          = false;     // with what high and low copies are worth
    int                           border_to_             = -1;        // whom the last look gave slots to; -1: nobody
    uint32_t                      border_run_            = 0;         // looks in a row that said so
    uint32_t                      border_seen_           = 0;         // token of the last look
    uint64_t                      inserted_[N_PRECISION] = { 0, 0 };  // bytes that got a slot since the last batch began
    bool                          resizing_              = false;     // between two looks of resize() under the lock
    std::exception_ptr            error_;

    std::atomic<bool>       failed_ { false };
    std::mutex              arrive_mutex_;  // only for the condition variable
    std::condition_variable arrive_;
    std::atomic<uint64_t>   arrivals_ { 0 };

    std::unique_ptr<reader> io_;
};

}  // namespace hobbit
