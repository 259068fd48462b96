// cache/expert-cache.h: random operations against a plain map.
#include "cache/expert-cache.h"

#include "test.h"

#include <map>
#include <random>
#include <set>
#include <tuple>

using namespace hobbit;
using state = cache_entry::state;

namespace {

constexpr int HIGH = 0, LOW = 1;

struct copy_key {
    uint32_t layer, expert;
    int      precision;

    bool operator<(const copy_key & o) const {
        return std::tie(layer, expert, precision) < std::tie(o.layer, o.expert, o.precision);
    }
};

struct copy_model {
    bool     resident        = false;
    uint32_t pins            = 0;
    uint64_t tick            = 0;
    uint64_t protected_until = 0;
};

// Random operations on a cache and on a map that does the same in the plainest way.
class random_run {
  public:
    explicit random_run(uint32_t seed) :
        random_(seed), pool_(POOL), cache_(shape(), pool_.data(), { priority_hobbit }, [this](const cache_entry & e) {
            evicted_.push_back({ e.layer, e.expert, e.precision });
        }) {}

    void step() {
        now_.token = 1 + below(50);
        now_.layer = below(N_LAYER);
        const copy_key key { below(N_LAYER), below(N_EXPERT), (int) below(2) };
        const auto     at = model_.find(key);
        switch (below(9)) {
            case 0:
            case 1:
            case 2:
                at == model_.end() ? insert(key) : fulfil(key, at->second);
                break;
            case 3:
                at != model_.end() ? pin(key, at->second) : use(key);
                break;
            case 4:
                at != model_.end() && at->second.pins > 0 ? unpin(key, at->second) : use(key);
                break;
            case 5:
                at != model_.end() ? touch(key, at->second) : use(key);
                break;
            case 6:
                at != model_.end() && at->second.pins == 0 && below(4) == 0 ? take_out(key) : use(key);
                break;
            case 7:
                below(2) ? void(cache_.pass++) : at != model_.end() ? protect(key, at->second) : use(key);
                break;
            case 8:
                if (below(8) == 0) {
                    cache_.set_limit(POOL / 2 + below(POOL));
                }
                below(2) ? take(key.precision) : add(key.precision);
                break;
        }
        compare();
    }

  private:
    static constexpr uint32_t N_LAYER = 3, N_EXPERT = 6, N_HIGH = 7, N_LOW = 4;
    static constexpr size_t   POOL = N_HIGH * 16 + N_LOW * 8;

    static cache_shape shape() {
        cache_shape s;
        s.n_layer       = N_LAYER;
        s.n_expert      = N_EXPERT;
        s.n_slots[0]    = N_HIGH;
        s.n_slots[1]    = N_LOW;
        s.slot_bytes[0] = 16;
        s.slot_bytes[1] = 8;
        s.bytes         = POOL;
        return s;
    }

    // What lies in the slot of a resident copy.
    static std::byte mark(const copy_key & k) { return (std::byte)(1 + k.precision + 2 * (k.expert + N_EXPERT * k.layer)); }

    uint32_t below(uint32_t n) { return (uint32_t) (random_() % n); }

    cache_entry * entry(const copy_key & k) { return cache_.find(k.layer, k.expert, k.precision); }

    uint32_t count(int precision) const {
        uint32_t n = 0;
        for (const auto & [key, copy] : model_) {
            n += key.precision == precision;
        }
        return n;
    }

    // Who has to go: the smallest (protected, priority, tick) of the resident, unpinned ones. End: nobody can.
    std::map<copy_key, copy_model>::iterator victim(int precision) {
        auto best = model_.end();
        auto rank = [&](const std::pair<const copy_key, copy_model> & c) {
            const auto & [key, copy] = c;
            return std::make_tuple(copy.protected_until >= cache_.pass,
                                   priority_hobbit(cache_.use(key.layer, key.expert), key.layer, now_), copy.tick);
        };
        for (auto it = model_.begin(); it != model_.end(); ++it) {
            if (it->first.precision == precision && it->second.resident && it->second.pins == 0 &&
                (best == model_.end() || rank(*it) < rank(*best))) {
                best = it;
            }
        }
        return best;
    }

    void insert(const copy_key & key) {
        const bool full = count(key.precision) == cache_.shape().n_slots[key.precision];
        const auto goes = full ? victim(key.precision) : model_.end();
        evicted_.clear();
        cache_entry * e = cache_.insert(key.layer, key.expert, key.precision, now_);
        CHECK_EQ(e != nullptr, !full || goes != model_.end());
        CHECK_EQ(evicted_.size(), full && e != nullptr ? 1u : 0u);
        if (e == nullptr) {
            return;
        }
        if (full) {
            CHECK(!(evicted_[0] < goes->first) && !(goes->first < evicted_[0]));
            model_.erase(goes);
        }
        model_[key].tick = ++clock_;
    }

    // The border moves a slot at a time, either way.
    void take(int precision) {
        const uint32_t before = cache_.shape().n_slots[precision];
        const bool     full   = count(precision) == before;
        const auto     goes   = full ? victim(precision) : model_.end();
        evicted_.clear();
        if (!cache_.take_slot(precision, now_)) {
            CHECK_EQ(cache_.shape().n_slots[precision], before);
            CHECK(evicted_.empty());
            return;
        }
        CHECK_EQ(cache_.shape().n_slots[precision], before - 1);
        if (evicted_.empty()) {
            return;
        }
        CHECK(full && goes != model_.end() && !(evicted_[0] < goes->first) && !(goes->first < evicted_[0]));
        model_.erase(goes);
    }

    void add(int precision) {
        const uint32_t before = cache_.shape().n_slots[precision];
        const bool     room   = cache_.used_bytes() + cache_.shape().slot_bytes[precision] <= cache_.limit();
        CHECK_EQ(cache_.add_slot(precision), room && before < N_LAYER * N_EXPERT);
    }

    void fulfil(const copy_key & key, copy_model & copy) {
        if (!copy.resident) {
            *entry(key)->data = mark(key);
            cache_.fulfil(entry(key));
            copy.resident = true;
        }
    }

    void pin(const copy_key & key, copy_model & copy) {
        cache_.pin(entry(key));
        copy.pins++;
    }

    void unpin(const copy_key & key, copy_model & copy) {
        cache_.unpin(entry(key));
        copy.pins--;
    }

    void touch(const copy_key & key, copy_model & copy) {
        cache_.touch(entry(key));
        copy.tick = ++clock_;
    }

    void protect(const copy_key & key, copy_model & copy) {
        copy.protected_until = entry(key)->protected_until = cache_.pass + below(4);
    }

    void take_out(const copy_key & key) {
        cache_.remove(entry(key));
        model_.erase(key);
    }

    void use(const copy_key & key) {
        use_record & use = cache_.use(key.layer, key.expert);
        use.last_token   = below(50);
        use.uses         = below(4);
        use.high_uses    = below(use.uses + 1);
    }

    void compare() {
        std::set<const std::byte *> slots;
        uint32_t                    n[2] = { 0, 0 }, resident[2] = { 0, 0 }, stuck[2] = { 0, 0 };
        for (uint32_t layer = 0; layer < N_LAYER; ++layer) {
            for (uint32_t expert = 0; expert < N_EXPERT; ++expert) {
                for (const int p : { HIGH, LOW }) {
                    const cache_entry * e  = cache_.find(layer, expert, p);
                    const auto          at = model_.find({ layer, expert, p });
                    CHECK_EQ(e != nullptr, at != model_.end());
                    if (e == nullptr) {
                        continue;
                    }
                    const copy_model & copy = at->second;
                    CHECK(e->layer == layer && e->expert == expert && e->precision == p);
                    CHECK(e->now == (copy.resident ? state::resident : state::in_flight));
                    CHECK(e->pins == copy.pins && e->tick == copy.tick && e->protected_until == copy.protected_until);
                    CHECK(slots.insert(e->data).second);
                    CHECK(!copy.resident || *e->data == mark({ layer, expert, p }));
                    n[p]++;
                    resident[p] += copy.resident;
                    stuck[p] += !copy.resident || copy.pins > 0;
                }
            }
        }
        for (const int p : { HIGH, LOW }) {
            CHECK_EQ(n[p], count(p));
            CHECK_EQ(cache_.resident(p), resident[p]);
            CHECK_EQ(cache_.available(p), cache_.shape().n_slots[p] - stuck[p]);
        }
    }

    std::mt19937                   random_;
    std::vector<std::byte>         pool_;
    expert_cache                   cache_;
    eviction_context               now_ { 1, 0, N_LAYER, 0.5f, { 0.25f, 0.25f, 0.25f, 0.25f } };
    std::map<copy_key, copy_model> model_;
    uint64_t                       clock_ = 0;
    std::vector<copy_key>          evicted_;
};

}  // namespace

TEST("random operations do what a plain map does") {
    for (const uint32_t seed : { 1u, 2u, 3u, 4u }) {
        random_run run(seed);
        for (int i = 0; i < 100000; ++i) {
            run.step();
        }
    }
}

TEST_MAIN()
