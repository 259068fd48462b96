// cache/expert-cache.h: its states as stories, and random operations against a plain map.
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

float by_uses(const use_record & use, uint32_t, const eviction_context &) { return (float) use.uses; }

// A cache of 2 layers x 8 experts with `n_high` and `n_low` slots, and words for what happens to it.
class cache_story {
  public:
    explicit cache_story(uint32_t n_high, uint32_t n_low = 1) :
        pool_(n_high * 64 + n_low * 32), cache(shape(n_high, n_low), pool_.data(), { by_uses }) {}

    cache_entry * insert(uint32_t expert, int precision = HIGH) {
        evicted.clear();
        return cache.insert(0, expert, precision, now, note, this);
    }

    void make_room(uint32_t n) {
        evicted.clear();
        cache.make_room(HIGH, n, now, note, this);
    }

    cache_entry * load(uint32_t expert, int precision = HIGH) {
        cache_entry * e = insert(expert, precision);
        if (e != nullptr) {
            cache.fulfil(e);
        }
        return e;
    }

    void uses(uint32_t expert, uint32_t n) { cache.use(0, expert).uses = n; }

    bool has(uint32_t expert, int precision = HIGH) { return cache.find(0, expert, precision) != nullptr; }

    std::vector<int> evicted;  // experts, by the last insert() or make_room()
    eviction_context now;

  private:
    static cache_shape shape(uint32_t n_high, uint32_t n_low) {
        cache_shape s;
        s.n_layer       = 2;
        s.n_expert      = 8;
        s.n_slots[0]    = n_high;
        s.n_slots[1]    = n_low;
        s.slot_bytes[0] = 64;
        s.slot_bytes[1] = 32;
        return s;
    }

    static void note(void * self, const cache_entry & e) { ((cache_story *) self)->evicted.push_back(e.expert); }

    std::vector<std::byte> pool_;

  public:
    expert_cache cache;
};

}  // namespace

TEST("an expert is absent, then in flight, then resident, then evicted") {
    cache_story s(1);
    CHECK(!s.has(3));
    cache_entry * e = s.insert(3);
    CHECK(s.cache.find(0, 3, HIGH) == e && e->now == state::in_flight);
    CHECK(e->layer == 0 && e->expert == 3 && e->precision == HIGH && e->data != nullptr);
    CHECK_EQ(s.cache.resident(HIGH), 0u);
    s.cache.fulfil(e);
    CHECK(e->now == state::resident);
    CHECK_EQ(s.cache.resident(HIGH), 1u);
    CHECK(s.load(4) != nullptr);
    CHECK(!s.has(3) && s.has(4));
    CHECK_EQ(s.evicted.size(), 1u);
    CHECK_EQ(s.evicted[0], 3);
}

TEST("a read that was given up, and a dropped expert, leave the slot free") {
    cache_story s(1);
    s.cache.remove(s.insert(3));
    CHECK(!s.has(3));
    CHECK_EQ(s.cache.available(HIGH), 1u);
    s.cache.remove(s.load(5));
    CHECK(!s.has(5));
    CHECK(s.load(4) != nullptr && s.evicted.empty());
}

TEST("room for several is made of those that would go one by one, and never of what is in use") {
    cache_story one(6), all(6);
    for (cache_story * s : { &one, &all }) {
        for (uint32_t e : { 0, 1, 2, 3, 4 }) {
            s->load(e);
        }
        s->cache.touch(s->cache.find(0, 0, HIGH));
        s->cache.pin(s->cache.find(0, 1, HIGH));
        s->cache.find(0, 2, HIGH)->protected_until = s->cache.pass;
        s->insert(5);  // in flight
    }
    std::set<int> went;
    for (uint32_t e : { 6, 7 }) {
        one.insert(e);
        went.insert(one.evicted.begin(), one.evicted.end());
    }
    all.make_room(2);
    CHECK(all.cache.n_free(HIGH) == 2 && std::set<int>(all.evicted.begin(), all.evicted.end()) == went && went.size() == 2);
    all.make_room(9);
    CHECK(all.has(1) && all.has(5) && !all.has(0) && !all.has(2));
    CHECK_EQ(all.cache.available(HIGH), 4u);
}

TEST("an expert in flight is never evicted") {
    cache_story s(1);
    s.insert(3);
    CHECK_EQ(s.cache.available(HIGH), 0u);
    CHECK(s.insert(4) == nullptr);
    CHECK(s.has(3) && !s.has(4));
}

TEST("a pinned expert is never evicted, until the last pin is gone") {
    cache_story   s(1);
    cache_entry * e = s.load(3);
    s.cache.pin(e);
    s.cache.pin(e);
    CHECK(s.insert(4) == nullptr);
    s.cache.unpin(e);
    CHECK_EQ(s.cache.available(HIGH), 0u);
    CHECK(s.insert(4) == nullptr && s.has(3));
    s.cache.unpin(e);
    CHECK_EQ(s.cache.available(HIGH), 1u);
    CHECK(s.insert(4) != nullptr && !s.has(3));
}

TEST("the entry of lowest priority goes") {
    cache_story s(3);
    s.load(1), s.load(2), s.load(3);
    s.uses(1, 5), s.uses(2, 2), s.uses(3, 7);
    s.load(4);
    CHECK(!s.has(2) && s.has(1) && s.has(3));
}

TEST("of equal priorities the least recently touched goes") {
    cache_story s(3);
    s.load(1), s.load(2), s.load(3);
    s.cache.touch(s.cache.find(0, 1, HIGH));
    s.load(4);
    CHECK(!s.has(2));
    s.load(5);
    CHECK(!s.has(3) && s.has(1));
}

TEST("a protected expert goes only when nothing else can") {
    cache_story s(2);
    s.load(1)->protected_until = s.cache.pass + 1;
    s.load(2);
    s.uses(1, 0), s.uses(2, 9);
    s.load(3);
    CHECK(s.has(1) && !s.has(2));  // 1 has the lowest priority, but is protected
    s.cache.pin(s.cache.find(0, 3, HIGH));
    CHECK(s.load(4) != nullptr);  // 3 is pinned: now it is 1's turn
    CHECK(!s.has(1) && s.has(3));
}

TEST("what was predicted does not go for what is only predicted as well") {
    cache_story s(2);
    s.load(1)->protected_until = s.cache.pass;
    s.load(2)->protected_until = s.cache.pass;
    CHECK(s.cache.insert(0, 3, HIGH, s.now, nullptr, nullptr, true) == nullptr);
    s.cache.make_room(HIGH, 1, s.now, nullptr, nullptr, true);
    CHECK(s.has(1) && s.has(2));
    s.cache.pass++;
    CHECK(s.cache.insert(0, 3, HIGH, s.now, nullptr, nullptr, true) != nullptr);
}

TEST("of two copies the low one is worth what no high one serves") {
    const eviction_rule rule { by_uses, slot_split::none, nullptr, true };
    cache_shape         shape;
    shape.n_layer    = 1;
    shape.n_expert   = 4;
    shape.n_slots[0] = shape.n_slots[1] = 2;
    shape.slot_bytes[0] = shape.slot_bytes[1] = 64;
    for (const bool serves : { true, false }) {
        std::vector<std::byte> pool(4 * 64);
        expert_cache           cache(shape, pool.data(), rule);
        eviction_context       now;
        now.high_serves_low = serves;
        for (const uint16_t e : { 0, 1 }) {  // 0 is used more, and mostly low
            cache.use(0, e).uses       = e == 0 ? 10 : 1;
            cache.use(0, e).high_share = 0.2f;
            cache.fulfil(cache.insert(0, e, LOW, now));
        }
        cache.fulfil(cache.insert(0, 0, HIGH, now));
        cache.fulfil(cache.insert(0, 2, LOW, now));
        CHECK_EQ(cache.find(0, 0, LOW) == nullptr, serves);
        CHECK_EQ(cache.find(0, 1, LOW) == nullptr, !serves);
    }
}

TEST("layers of different sizes: no slots for experts that there are not") {
    cache_shape shape;
    shape.n_layer       = 2;
    shape.n_expert      = 8;
    shape.layer_experts = { 8, 2 };
    shape.n_slots[0]    = 9;
    shape.slot_bytes[0] = 64;
    shape.bytes         = 16 * 64;
    std::vector<std::byte> pool(shape.bytes);
    expert_cache           cache(shape, pool.data(), { by_uses });
    CHECK(cache.add_slot(HIGH));
    CHECK(!cache.add_slot(HIGH));
    for (uint16_t i = 0; i < 10; ++i) {
        CHECK(cache.insert(i / 8, i % 8, HIGH, {}) != nullptr);
    }
    CHECK(!cache.full(HIGH));
}

TEST("protection ends when its layer has passed") {
    cache_story s(2);
    s.load(1)->protected_until = s.cache.pass;
    s.load(2);
    s.uses(1, 0), s.uses(2, 9);
    s.cache.pass++;
    s.load(3);
    CHECK(!s.has(1) && s.has(2));
}

TEST("the slot of an evicted expert is clean for the next") {
    cache_story   s(1);
    cache_entry * e    = s.load(1);
    e->protected_until = 99;
    e->prefetched      = true;
    e->bytes           = 7;
    e->cancel          = true;
    e->demanded        = true;
    e->parts           = 7;
    e                  = s.insert(2);
    CHECK(e->protected_until == 0 && !e->prefetched && e->bytes == 0 && e->reading == 0 && e->pins == 0);
    CHECK(!e->cancel && !e->demanded && e->parts == 0);
}

TEST("high and low copies have slots of their own") {
    cache_story   s(1, 1);
    cache_entry * high = s.load(1, HIGH);
    cache_entry * low  = s.load(1, LOW);
    CHECK(high != low && high->data != low->data);
    CHECK(s.load(2, LOW) != nullptr);
    CHECK(s.has(1, HIGH) && !s.has(1, LOW));
    CHECK_EQ(s.cache.resident(HIGH), 1u);
    CHECK_EQ(s.cache.resident(LOW), 1u);
}

TEST("a new sequence forgets the uses and keeps the contents") {
    cache_story s(2);
    s.load(1), s.uses(1, 5);
    s.cache.reset_uses();
    CHECK(s.has(1));
    CHECK_EQ(s.cache.use(0, 1).uses, 0u);
}

TEST("with slots of its own for each layer, a layer evicts its own experts only") {
    cache_shape shape;
    shape.n_layer       = 2;
    shape.n_expert      = 8;
    shape.k             = 1;
    shape.layer_experts = { 8, 8 };
    shape.n_slots[0]    = 4;
    shape.n_slots[1]    = 1;
    shape.slot_bytes[0] = shape.slot_bytes[1] = 16;
    std::vector<std::byte> pool(5 * 16);
    expert_cache           cache(shape, pool.data(), { by_uses, slot_split::even });
    eviction_context       now;
    const auto             load = [&](uint32_t layer, uint32_t expert, int precision = HIGH) {
        cache_entry * e = cache.insert(layer, expert, precision, now);
        if (e != nullptr) {
            cache.fulfil(e);
        }
        return e;
    };
    load(0, 1), load(0, 2);
    cache.use(0, 1).uses = cache.use(0, 2).uses = 9;
    CHECK(load(0, 3) != nullptr);  // there are free slots, but not for this layer
    CHECK(cache.find(0, 1, HIGH) == nullptr && cache.find(0, 2, HIGH) != nullptr);
    load(1, 1), load(1, 2), load(1, 3);
    CHECK(cache.find(0, 2, HIGH) != nullptr && cache.find(0, 3, HIGH) != nullptr);
    CHECK(cache.find(1, 1, HIGH) == nullptr && cache.resident(HIGH) == 4);
    cache.pin(cache.find(1, 2, HIGH)), cache.pin(cache.find(1, 3, HIGH));
    CHECK(load(1, 4) == nullptr);
    cache.remove(cache.find(0, 2, HIGH));
    CHECK(load(1, 4) == nullptr && load(0, 5) != nullptr);            // what became free is layer 0's
    CHECK(load(1, 1, LOW) != nullptr && load(0, 1, LOW) != nullptr);  // low copies compete everywhere
    CHECK(cache.find(1, 1, LOW) == nullptr);
}

namespace {

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
    explicit random_run(uint32_t seed) : random_(seed), pool_(POOL), cache_(shape(), pool_.data(), { priority_hobbit }) {}

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
        cache_entry * e = cache_.insert(key.layer, key.expert, key.precision, now_, note, this);
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
        if (!cache_.take_slot(precision, now_, note, this)) {
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

    static void note(void * self, const cache_entry & e) {
        ((random_run *) self)->evicted_.push_back({ e.layer, e.expert, e.precision });
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

TEST("a slot fewer: what lay in it takes the place of what has the lowest priority") {
    cache_story s(3);
    for (const uint32_t expert : { 1u, 2u, 3u }) {
        *s.load(expert)->data = (std::byte) expert;
    }
    s.uses(1, 1), s.uses(2, 5), s.uses(3, 9);  // 3 lies at the border
    CHECK(s.cache.take_slot(HIGH, s.now));
    CHECK(!s.has(1) && s.has(2) && s.has(3));
    CHECK(*s.cache.find(0, 3, HIGH)->data == (std::byte) 3 && *s.cache.find(0, 2, HIGH)->data == (std::byte) 2);
    CHECK(s.load(4) != nullptr && !s.has(2));  // two slots are left
    s.cache.pin(s.cache.find(0, 4, HIGH));
    s.cache.pin(s.cache.find(0, 3, HIGH));
    CHECK(!s.cache.take_slot(HIGH, s.now));  // in use
    CHECK(s.cache.add_slot(HIGH) && s.load(5) != nullptr && s.has(3) && s.has(4));
    CHECK(!s.cache.add_slot(HIGH));  // the pool has no more
}

TEST("random operations do what a plain map does") {
    for (const uint32_t seed : { 1u, 2u, 3u, 4u }) {
        random_run run(seed);
        for (int i = 0; i < 100000; ++i) {
            run.step();
        }
    }
}

TEST_MAIN()
