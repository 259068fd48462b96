// An expert store over a tiny GGUF with slots counted, and words for what is asked of it.
#pragma once

#include "base/error.h"
#include "engine/expert-store.h"

#include "test.h"
#include "tiny-gguf.h"

#include <memory>
#include <atomic>
#include <thread>

namespace test {

inline hobbit_params tiny_params() {
    hobbit_params p  = {};
    p.struct_size    = sizeof(p);
    p.precision_rule = HOBBIT_PRECISION_MISS;
    p.eviction_rule  = HOBBIT_EVICT_LRU;
    p.t1             = 0.6f;
    p.t2             = 0.9f;
    p.renormalize    = 1;
    p.w_lru = p.w_lfu = p.w_lhu = p.w_fld = 0.25f;
    p.prefetch_depth                      = 1;
    p.prefetch_reads                      = 2;
    p.io_threads                          = 3;
    p.io_block                            = 4096;
    return p;
}

struct store_setup {
    uint32_t      slots_high    = 4;
    uint32_t      slots_low     = 0;
    bool          moving_border = false;
    float         low_share     = 0.0f;  // without low slots: what a smaller pool has
    hobbit_params params        = tiny_params();

    hobbit::expert_store::arrival_hook on_arrival = {};
};

// Holds readers up at an arrival, until somebody says go. Outlives the store.
struct held_arrivals {
    std::atomic<bool> arrived { false };
    std::atomic<bool> go { false };

    void hold() {
        arrived = true;
        while (!go) {
            std::this_thread::yield();
        }
    }

    void wait() const {
        while (!arrived) {
            std::this_thread::yield();
        }
    }
};

using hobbit::expert_want;
using hobbit::policy::action;
using hobbit::policy::need;
using hobbit::policy::precision_rule;
using wants = std::vector<expert_want>;

inline expert_want want(uint16_t expert, need n = need::high, uint32_t count = 1) {
    expert_want w;
    w.expert = expert;
    w.need   = n;
    w.count  = count;
    return w;
}

// Runs body(0) .. body(n - 1) on a thread each. A failed check on one of them reaches the test.
template <typename F>
void on_threads(int n, F && body) {
    std::vector<std::thread>        threads;
    std::vector<std::exception_ptr> failures((size_t) n);
    for (int i = 0; i < n; ++i) {
        threads.emplace_back([&, i] {
            try {
                body(i);
            } catch (...) {
                failures[(size_t) i] = std::current_exception();
            }
        });
    }
    for (std::thread & t : threads) {
        t.join();
    }
    for (const std::exception_ptr & failure : failures) {
        if (failure) {
            std::rethrow_exception(failure);
        }
    }
}

inline store_setup slots(uint32_t high, uint32_t low = 0) {
    store_setup s;
    s.slots_high = high;
    s.slots_low  = low;
    return s;
}

inline bool hit(const expert_want & w) {
    return w.entry != nullptr && (w.action == action::use_high || w.action == action::use_low);
}

inline bool loaded(const expert_want & w) {
    return w.entry != nullptr && (w.action == action::load_high || w.action == action::load_low);
}

class tiny_store {
  public:
    explicit tiny_store(const store_setup & setup = {}) : setup_(setup) {
        model_.write(path());
        index_ = std::make_unique<hobbit::expert_index>(path(), "", setup.params.direct_io != 0);
        open();
    }

    // A store anew, with nothing in it.
    void open() {
        const uint64_t high = setup_.slots_high * index_->max_slot[0], low = setup_.slots_low * index_->max_slot[1];
        hobbit_params  p      = setup_.params;
        p.low_share           = setup_.slots_low == 0
                                    ? setup_.low_share
                                    : (float) (((double) setup_.slots_low + 0.5) / setup_.slots_low * low / (high + low));
        p.fixed_split         = !setup_.moving_border;
        const uint64_t stream = hobbit::pool_min(*index_) - index_->n_expert_used * index_->max_slot[0];
        store_.reset();
        store_ = std::make_unique<hobbit::expert_store>(*index_, p, high + low + stream, setup_.on_arrival);
        CHECK_EQ(stats().slots_high, setup_.slots_high);
        CHECK_EQ(stats().slots_low, setup_.slots_low);
    }

    wants acquire(uint32_t layer, wants w, precision_rule rule = precision_rule::miss) {
        if (layer == 0) {
            store_->begin_batch(1);
        }
        store_->acquire(layer, rule, w);
        return w;
    }

    // Acquires, waits, checks the bytes, releases: a pass over a layer.
    wants pass(uint32_t layer, const wants & what, precision_rule rule = precision_rule::miss) {
        const wants got = acquire(layer, what, rule);
        arrive(got);
        check(layer, got);
        store_->release(got);
        return got;
    }

    template <typename F>
    void wait_until(F && true_now) {
        while (true) {
            const uint64_t seen = store_->arrivals();
            if (true_now()) {
                return;
            }
            store_->wait(seen);
        }
    }

    uint32_t n_parts() const { return (uint32_t) index_->layers()[0].projections.size(); }

    // Until all that was acquired is there or the store has failed.
    void arrive(const wants & got) {
        for (const expert_want & w : got) {
            for (uint32_t part = 0; part < n_parts(); ++part) {
                wait_until(
                    [&] { return w.entry == nullptr || hobbit::expert_store::ready(*w.entry, part) || store_->failed(); });
            }
        }
    }

    // The slice at `data` has the bytes of the file.
    void check_slice(const std::byte * data, uint32_t layer, uint32_t expert, hobbit::precision p, uint32_t part,
                     uint64_t begin = 0, uint64_t end = UINT64_MAX) const {
        const auto &      proj = index_->layers()[layer].projections[part];
        const auto &      src  = proj.source[(int) p];
        const std::string name = (p == hobbit::precision::low ? hobbit::LOW_PREFIX : "") + proj.name;
        const uint32_t    seed = seed_of(name);
        for (uint64_t i = begin; i < std::min(end, src.slice); ++i) {
            if ((unsigned char) data[i] != byte_at(seed, expert * src.slice + i)) {
                fail(__FILE__, __LINE__,
                     hobbit::format("byte %llu of expert %u of %s is wrong", (unsigned long long) i, expert, name.c_str()));
            }
        }
    }

    void check(uint32_t layer, const wants & got) const {
        for (const expert_want & w : got) {
            for (uint32_t part = 0; w.entry != nullptr && part < n_parts(); ++part) {
                CHECK(hobbit::expert_store::ready(*w.entry, part));
                check_slice(store_->slice(*w.entry, part), layer, w.expert, (hobbit::precision) w.entry->precision, part);
            }
        }
    }

    // Reads a want that found no slot through streaming slot `i`, and checks it.
    void stream(uint32_t layer, const expert_want & w, size_t i = 0) {
        const auto            p    = w.action == action::load_low ? hobbit::precision::low : hobbit::precision::high;
        hobbit::stream_slot & slot = *store_->stream_slots()[i];
        for (uint32_t part = 0; part < n_parts(); ++part) {
            store_->stream(layer, w.expert, p, part, slot);
            wait_until([&] { return slot.ready.load() || store_->failed(); });
            CHECK(slot.ready.load());
            check_slice(slot.data, layer, w.expert, p, part);
        }
    }

    hobbit_stats stats() {
        hobbit_stats s = {};
        store_->stats(s);
        return s;
    }

    hobbit_counts total() { return stats().total; }

    // The contracts of hobbit_counts.
    void check_counts() {
        for (uint32_t layer = 0; layer <= index_->layers().size(); ++layer) {
            hobbit_counts c = total();
            if (layer < index_->layers().size()) {
                store_->layer_counts(layer, c);
            }
            CHECK_EQ(c.selections, c.hits_high + c.hits_low + c.loads_high + c.loads_low + c.skips);
            CHECK(c.prefetches >= c.prefetches_useful + c.prefetches_late + c.prefetches_wasted);
            CHECK(c.bytes_prefetch >= c.bytes_wasted);
        }
    }

    // Makes all experts of the file unreadable under the store, and readable again.
    void cut_file() {
        whole_ = read_all(path());
        std::filesystem::resize_file(path(), 100);
    }

    void restore_file() { write_all(path(), whole_, "r+b"); }

    // After a failure: nothing is being read any more for the pass that was given up.
    void settle() {
        while (store_->io().demand_pending() > 0) {
            std::this_thread::yield();
        }
    }

    std::string path() const { return folder_.path("model.gguf"); }

    hobbit::expert_store & store() { return *store_; }

    const hobbit::expert_index & index() const { return *index_; }

    uint64_t expert_bytes(hobbit::precision p) const { return index_->layers()[0].expert_bytes(p); }

  private:
    store_setup                           setup_;
    temp_folder                           folder_;
    tiny_model                            model_;
    bytes                                 whole_;
    std::unique_ptr<hobbit::expert_index> index_;
    std::unique_ptr<hobbit::expert_store> store_;
};

}  // namespace test
