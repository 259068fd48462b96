// What arrives from disk, and who waits for it.
#include "expert-store.h"

#include <thread>

namespace hobbit {

// Part number of a request that reads into a streaming slot.
static constexpr uint32_t STREAM_PART = 1u << 16;

// Times that a waiting thread steps aside before it sleeps.
static constexpr int N_YIELD = 100;

void expert_store::stream(uint32_t layer, uint32_t expert, precision p, uint32_t part, stream_slot & slot) {
    io_request   r = read_of(layer, expert, p, part, slot.room);
    const extent x = index_.layers()[layer].projections[part].source[(int) p].expert(expert);
    r.owner        = &slot;
    r.part         = STREAM_PART;
    slot.data.store(slot.room + (x.offset - r.offset), std::memory_order_relaxed);
    slot.layer = layer;
    slot.part  = part;
    slot.prec  = p;
    slot.ready.store(false, std::memory_order_relaxed);
    slot.asked = timeline::clock::now();
    io_->demand({ r });
}

void expert_store::note_arrival(hobbit_event_kind kind, uint32_t layer, timeline::clock::time_point asked, uint64_t bytes) {
    if (times_ != nullptr && times_->on()) {
        times_->add(kind, index_.layers()[layer].block, asked, timeline::clock::now(), bytes);
    }
}

// Moves an entry on when its last read has ended.
void expert_store::settle(cache_entry & entry) {
    if (entry.now != cache_entry::state::in_flight || entry.reading != 0) {
        return;
    }
    const uint32_t all = (1u << index_.layers()[entry.layer].projections.size()) - 1;
    if (entry.parts.load(std::memory_order_relaxed) == all) {
        cache_->fulfil(&entry);
    } else if (entry.pins == 0) {
        count_evicted(entry);  // cancelled, which is counted already, or a read failed
        cache_->remove(&entry);
    }
}

void expert_store::on_read_end(const io_request & r, io_outcome outcome, std::exception_ptr why) {
    if (r.part == STREAM_PART) {
        auto * slot = (stream_slot *) r.owner;
        if (outcome == io_outcome::done && on_arrival_) {
            on_arrival_(slot->layer, slot->part, slot->prec, slot->data.load(std::memory_order_relaxed));
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const uint64_t              bytes = outcome == io_outcome::done ? r.bytes : r.done;
            counts_[slot->layer].bytes_demand += bytes;
            note_arrival(HOBBIT_EVENT_READ, slot->layer, slot->asked, bytes);
            if (outcome == io_outcome::failed) {
                error_ = error_ ? error_ : why;
                failed_.store(true, std::memory_order_release);
            } else {
                slot->ready.store(true, std::memory_order_release);
            }
        }

        notify();
        return;
    }

    auto * e = (cache_entry *) r.owner;
    if (outcome == io_outcome::done && on_arrival_) {
        // In flight, and this part's bit is not set: nobody else looks at it.
        on_arrival_(e->layer, r.part, (precision) e->precision, slice(*e, r.part));
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const bool                  demanded = e->demanded.load(std::memory_order_relaxed);
        if (outcome == io_outcome::cancelled && (demanded || !e->cancel.load(std::memory_order_relaxed))) {
            // The router chose it after all, or it was predicted again, between the cancel and now.
            e->cancel.store(false, std::memory_order_relaxed);
            demanded ? io_->demand({ r }) : io_->prefetch({ r });
            return;
        }
        const uint64_t bytes   = outcome == io_outcome::done ? r.bytes : r.done;
        const bool     warming = is_warming(*e);
        (demanded ? counts_[e->layer].bytes_demand : warming ? bytes_warmed_ : counts_[e->layer].bytes_prefetch) += bytes;
        if (!demanded && e->cancel.load(std::memory_order_relaxed)) {
            counts_[e->layer].bytes_wasted += bytes;  // its entry was counted before this read ended
        }
        e->bytes += bytes;
        if (demanded || !warming) {
            note_arrival(demanded ? HOBBIT_EVENT_READ : HOBBIT_EVENT_PREFETCH, e->layer, asked_[demanded][e->layer], bytes);
        }

        e->reading &= ~(1u << r.part);
        if (outcome == io_outcome::done) {
            e->parts.fetch_or(1u << r.part, std::memory_order_release);
        }
        if (outcome == io_outcome::failed && demanded && !error_) {
            error_ = why;  // a failed prefetch is silent: a demand read will tell
        }
        settle(*e);
        if (warming) {
            warming_read_end(*e, outcome == io_outcome::failed);
        }
        if (outcome == io_outcome::failed && demanded) {
            failed_.store(true, std::memory_order_release);
        }
    }
    notify();
}

void expert_store::notify() {
    arrivals_.fetch_add(1, std::memory_order_acq_rel);
    { std::lock_guard<std::mutex> lock(arrive_mutex_); }
    arrive_.notify_all();
}

void expert_store::wait(uint64_t seen) {
    // A read of a slice takes some 400 us, waking from sleep 50 us and more. Stepping aside a few times first (the processor goes to a
    // reader or to another compute thread, if one wants it) gave 19.8 instead of 16.5 tokens/s on two cores.
    for (int i = 0; i < N_YIELD; ++i) {
        if (arrivals() != seen || failed()) {
            return;
        }
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(arrive_mutex_);
    arrive_.wait(lock, [&] { return arrivals() != seen || failed(); });
}

bool expert_store::take_error(std::exception_ptr & out) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failed()) {
        return false;
    }
    out    = error_;
    error_ = nullptr;
    failed_.store(false, std::memory_order_release);
    return true;
}

}  // namespace hobbit
