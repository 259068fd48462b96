// The part of the expert store that fills an empty pool by what earlier runs used: see hobbit_session_warm.
//
// A few experts at a time are in flight, and their reads stand at the end of the prefetch queue: behind what is demanded, and behind what
// is predicted. They take free slots only. The first layer that asks for experts ends it: on a disk that its misses keep busy going on cost
// the first 8 tokens a quarter more time (bench model, 970 MiB), and a few tokens fill the pool by themselves.
#include "../base/error.h"
#include "expert-store.h"

#include <algorithm>

namespace hobbit {

// Experts in flight: enough to keep the prefetch reads busy from one expert to the next.
static constexpr size_t WARMING_AT_A_TIME = 2;

bool expert_store::heat(std::vector<hobbit_heat> & out) {
    if (!foresight_) {
        return false;  // nobody keeps rates
    }
    std::lock_guard<std::mutex> lock(mutex_);
    out.assign(uses_.size(), {});
    for (uint32_t layer = 0; layer < index_.layers().size(); ++layer) {
        for (uint32_t e = 0; e < index_.layers()[layer].n_expert; ++e) {
            const use_record & use                    = cache_->use(layer, e);
            out[(size_t) layer * index_.n_expert + e] = { std::min(use.rate, 1.0f), std::min(use.high_share, 1.0f) };
        }
    }
    return true;
}

void expert_store::warm(const hobbit_heat * heat) {
    if (!foresight_) {
        fail(HOBBIT_ERR_UNSUPPORTED, "only the eviction rule foresight goes by rates of use");
    }
    std::lock_guard<std::mutex> lock(mutex_);
    to_warm_.clear();
    for (auto layer = (uint32_t) index_.layers().size(); layer-- > 0;) {
        for (uint32_t e = index_.layers()[layer].n_expert; e-- > 0;) {
            const hobbit_heat & h   = heat[(size_t) layer * index_.n_expert + e];
            use_record &        use = cache_->use(layer, e);
            use.rate = use.recent = h.rate;
            use.seen[0] = use.seen[1] = h.rate * FORESIGHT_TOTAL;
            use.high_share            = h.high_share;
            to_warm_.push_back({ (uint16_t) layer, (uint16_t) e });
        }
    }
    // Taken from the end: the hottest first, of equal ones those of the first layers.
    std::stable_sort(to_warm_.begin(), to_warm_.end(), [&](const expert_id & a, const expert_id & b) {
        return heat[(size_t) a.layer * index_.n_expert + a.expert].rate <
               heat[(size_t) b.layer * index_.n_expert + b.expert].rate;
    });
    if (params_.prefetch_reads == 0) {
        to_warm_.clear();  // nobody would read them
    }
    feed_warming();
}

void expert_store::feed_warming() {
    std::vector<io_request> requests;
    while (!to_warm_.empty() && warming_.size() < WARMING_AT_A_TIME) {
        const expert_id id = to_warm_.back();
        to_warm_.pop_back();
        if (cache_->find(id.layer, id.expert, 0) != nullptr || cache_->find(id.layer, id.expert, 1) != nullptr) {
            continue;
        }
        // When the high slots are full, what is next hottest goes into the low ones.
        const int p = cache_->n_free(0) > 0 ? 0 : 1;
        // What is in flight cannot be evicted: the running layer must find room beside it.
        if (cache_->n_free(p) == 0 || cache_->available(p) <= index_.n_expert_used) {
            to_warm_.clear();
            break;
        }
        cache_entry * e = cache_->insert(id.layer, id.expert, p, now_, true);
        warming_.push_back(e);
        for (uint32_t part = 0; part < index_.layers()[id.layer].projections.size(); ++part) {
            request_part(*e, part, requests);
        }
    }
    io_->prefetch(requests);
}

// Puts what is queued for warming behind `requests`, which are about to be queued.
void expert_store::put_warming_behind(std::vector<io_request> & requests) {
    if (requests.empty()) {
        return;
    }
    for (cache_entry * e : warming_) {
        const std::vector<io_request> behind = io_->withdraw(e);
        requests.insert(requests.end(), behind.begin(), behind.end());
    }
}

bool expert_store::is_warming(const cache_entry & entry) const {
    return std::find(warming_.begin(), warming_.end(), &entry) != warming_.end();
}

// A read of an expert that is being warmed has ended.
void expert_store::warming_read_end(cache_entry & entry, bool failed) {
    if (failed) {
        to_warm_.clear();  // whoever needs it will say what is wrong
    }
    if (entry.reading == 0) {
        warming_.erase(std::find(warming_.begin(), warming_.end(), &entry));
        n_warmed_ += entry.now == cache_entry::state::resident && !entry.demanded.load(std::memory_order_relaxed);
        feed_warming();
    }
}

}  // namespace hobbit
