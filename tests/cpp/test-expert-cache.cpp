// cache/expert-cache.h: its states as stories.
#include "cache/expert-cache.h"

#include "test.h"

#include <set>

using namespace hobbit;
using state = cache_entry::state;

namespace {

constexpr int HIGH = 0, LOW = 1;

float by_uses(const use_record & use, uint32_t, const eviction_context &) { return (float) use.uses; }

// A cache of 2 layers x 8 experts with `n_high` and `n_low` slots, and words for what happens to it.
class cache_story {
  public:
    explicit cache_story(uint32_t n_high, uint32_t n_low = 1) :
        pool_(n_high * 64 + n_low * 32),
        cache(shape(n_high, n_low), pool_.data(), { by_uses },
              [this](const cache_entry & e) { evicted.push_back(e.expert); }) {}

    cache_entry * insert(uint32_t expert, int precision = HIGH) {
        evicted.clear();
        return cache.insert(0, expert, precision, now);
    }

    void make_room(uint32_t n) {
        evicted.clear();
        cache.make_room(HIGH, n, now);
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
    CHECK(s.cache.insert(0, 3, HIGH, s.now, true) == nullptr);
    s.cache.make_room(HIGH, 1, s.now, true);
    CHECK(s.has(1) && s.has(2));
    s.cache.pass++;
    CHECK(s.cache.insert(0, 3, HIGH, s.now, true) != nullptr);
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

TEST_MAIN()
