// engine/expert-store-border.cpp: a pool that shrinks and grows, and the border between high and low slots.
#include "tiny-store.h"

#include <algorithm>

using namespace test;
using hobbit::expert_store;
using hobbit::precision;

TEST("a pool below the smallest is refused, the smallest works") {
    tiny_store          s;
    const hobbit_params p   = tiny_params();
    const uint64_t      min = pool_min(s.index());
    CHECK_THROWS(expert_store(s.index(), p, min - 1));
    expert_store smallest(s.index(), p, min);
    hobbit_stats stats = {};
    smallest.stats(stats);
    CHECK_EQ(stats.slots_high, s.index().n_expert_used);
    CHECK(stats.pool_bytes <= min + hobbit::PAGE);
}

TEST("a pool shrinks and grows while it is used, and the floor holds") {
    tiny_store                  s(slots(6, 2));
    const uint64_t              full = s.stats().pool_bytes;
    const uint64_t              slot = s.index().max_slot[0];
    const std::vector<uint16_t> experts { 0, 1, 2, 3, 4, 5 };
    for (const uint16_t e : experts) {
        s.pass(0, { want(e) });
    }
    CHECK_EQ(s.stats().resident_high, 6u);
    const wants held = s.acquire(0, { want(5) });
    s.store().resize(full - 4 * slot);
    CHECK(s.stats().pool_bytes <= full - 4 * slot + hobbit::PAGE);
    s.store().release(held);
    s.pass(0, { want(5) });  // what was in use goes at the next token
    const hobbit_stats small = s.stats();
    CHECK(small.slots_high * slot + small.slots_low * s.index().max_slot[1] <= 8 * slot - 4 * slot);
    CHECK(small.slots_high >= s.index().n_expert_used && small.resident_high <= small.slots_high);
    s.store().resize(full);
    CHECK_EQ(s.stats().pool_bytes, full);
    for (const uint16_t e : experts) {
        s.pass(0, { want(e) });
    }
    CHECK(s.stats().resident_high > small.resident_high);
    CHECK_THROWS(s.store().resize(pool_min(s.index()) - 1));
    CHECK_EQ(s.stats().pool_bytes, full);
}

TEST("a pool that is half low copies shrinks down to the floor") {
    tiny_store s(slots(8, 16));
    for (uint16_t e = 0; e < 8; ++e) {
        s.pass(0, { want(e), want((uint16_t) ((e + 1) % 8), need::low) });
    }
    for (const uint64_t more : { 2u, 1u, 0u }) {
        s.store().resize(pool_min(s.index()) + more * s.index().max_slot[0]);
        const hobbit_stats now  = s.stats();
        const uint64_t     used = now.slots_high * s.index().max_slot[0] + now.slots_low * s.index().max_slot[1];
        CHECK(used <= (s.index().n_expert_used + more) * s.index().max_slot[0]);
        CHECK(now.slots_high >= s.index().n_expert_used);
    }
}

TEST("a pool that held every expert in high precision does so again after it was smaller") {
    store_setup setup = slots(24);
    setup.low_share   = 0.1f;
    tiny_store     s(setup);
    const uint64_t full = s.stats().pool_bytes;
    s.store().resize(full / 2);
    CHECK(s.stats().slots_low >= s.index().n_expert_used && s.stats().slots_high < 24);
    const wants held = s.acquire(0, { want(1), want(2, need::low) });
    s.arrive(held);
    s.store().resize(full);
    s.store().release(held);
    s.pass(0, { want(1) });  // what was in use is given up at the next token
    CHECK_EQ(s.stats().slots_high, 24u);
    CHECK_EQ(s.stats().slots_low, 0u);
    const wants got = s.pass(0, { want(3, need::low) });
    CHECK(got[0].action == action::load_high || got[0].action == action::use_high);
}

TEST("high slots that are empty go over to low copies at once, where these are what is read") {
    for (const bool high_too : { false, true }) {
        store_setup setup          = slots(12, 2);
        setup.params.eviction_rule = HOBBIT_EVICT_FORESIGHT;
        setup.moving_border        = true;
        tiny_store s(setup);
        for (uint16_t token = 0; token < 3; ++token) {
            for (uint32_t layer = 0; layer < 3; ++layer) {
                wants w = { want(token, need::low) };
                if (high_too) {
                    w.push_back(want((uint16_t) (token + 4)));
                }
                s.pass(layer, w);
            }
        }
        const hobbit_stats now = s.stats();
        CHECK_EQ(now.slots_low > 6, !high_too);
        CHECK(now.slots_high >= now.resident_high && now.slots_low >= now.resident_low);
        CHECK_EQ(now.resident_low, high_too ? 2u : 8u);  // the first token had room for two
    }
}

TEST("a token that finds everything moves no slots") {
    store_setup setup          = slots(2, 12);
    setup.params.eviction_rule = HOBBIT_EVICT_FORESIGHT;
    setup.moving_border        = true;
    tiny_store s(setup);
    for (int token = 0; token < 6; ++token) {
        s.pass(0, { want(0), want(1, need::low), want(2, need::low) });
        s.pass(1, { want(0), want(1, need::low), want(2, need::low) });
    }
    CHECK(s.total().loads_high == 2 && s.total().loads_low == 4);
    CHECK_EQ(s.stats().slots_high, 2u);
    CHECK_EQ(s.stats().slots_low, 12u);
}

TEST("slots follow what the copies are worth where several tokens are a batch, whatever the clock began with") {
    store_setup setup          = slots(6, 2);
    setup.params.eviction_rule = HOBBIT_EVICT_FORESIGHT;
    setup.moving_border        = true;
    tiny_store s(setup);
    const auto batch = [&](uint32_t n, uint16_t e) {
        for (uint32_t layer = 0; layer < 3; ++layer) {
            const std::vector<int32_t> ids(n, e);
            s.store().observe(layer, ids.data(), 1, 1, n);
            wants w = { want(e, need::low, n) };
            if (layer == 0) {
                s.store().begin_batch(n);
            }
            s.store().acquire(layer, precision_rule::miss, w);
            s.arrive(w);
            s.store().release(w);
        }
    };
    batch(7, 0);
    for (uint32_t i = 0; i < 400; ++i) {
        batch(2, (uint16_t) (i % 8));
    }
    CHECK(s.stats().slots_low > 4 && s.stats().slots_high < 5);
}

TEST("slots follow what the copies are worth: low needs alone turn the pool over to low copies") {
    store_setup setup          = slots(6, 2);
    setup.params.eviction_rule = HOBBIT_EVICT_FORESIGHT;
    setup.moving_border        = true;
    tiny_store s(setup);
    for (uint32_t i = 0; i < 400; ++i) {
        const auto e = (uint16_t) (i % 8);
        for (uint32_t layer = 0; layer < 3; ++layer) {
            const int32_t id = e;
            s.store().observe(layer, &id, 1, 1, 1);
            s.pass(layer, { want(e, need::low) });
        }
    }
    CHECK(s.stats().slots_low > 4 && s.stats().slots_high < 5);
}

TEST("by weight the pool that holds everything reads everything once") {
    store_setup setup           = slots(24, 24);
    setup.params.precision_rule = HOBBIT_PRECISION_WEIGHT;
    setup.params.eviction_rule  = HOBBIT_EVICT_FORESIGHT;
    setup.moving_border         = true;
    tiny_store s(setup);
    const auto all_of_it = [&] {
        for (uint32_t i = 0; i < 40; ++i) {
            for (uint32_t layer = 0; layer < 3; ++layer) {
                s.pass(layer, { want((uint16_t) (i % 8), i % 3 == 0 ? need::low : need::high) }, precision_rule::weight);
            }
        }
    };
    all_of_it();
    const hobbit_counts c = s.total();
    CHECK(c.loads_low == 3 * 8 && c.loads_high == 3 * 8);
    const uint64_t full = s.stats().pool_bytes;
    CHECK_EQ(full, hobbit::align_up(pool_max(s.index(), setup.params), hobbit::PAGE));
    s.store().resize(full / 2);
    s.store().resize(full);
    s.pass(0, { want(0) }, precision_rule::weight);
    CHECK(s.stats().slots_high == 24 && s.stats().slots_low == 24);
}

TEST("by weight high slots of all experts are not given up for low ones that are worth less") {
    store_setup setup           = slots(24, 4);
    setup.params.precision_rule = HOBBIT_PRECISION_WEIGHT;
    setup.params.eviction_rule  = HOBBIT_EVICT_FORESIGHT;
    setup.moving_border         = true;
    tiny_store s(setup);
    for (uint32_t i = 0; i < 400; ++i) {
        for (uint32_t layer = 0; layer < 3; ++layer) {
            const int32_t id = (int32_t) (i % 8);
            s.store().observe(layer, &id, 1, 1, 1);
            s.pass(layer, { want((uint16_t) id, i % 80 < 8 ? need::low : need::high) }, precision_rule::weight);
        }
    }
    CHECK(s.stats().slots_high >= 22 && s.total().loads_high < 3 * 8 + 20);
}

TEST("by weight, what every high copy leaves free is for low ones") {
    tiny_store    s;
    hobbit_params p  = tiny_params();
    p.precision_rule = HOBBIT_PRECISION_WEIGHT;
    p.low_share      = 0.02f;
    expert_store whole(s.index(), p, pool_max(s.index(), p));
    hobbit_stats stats = {};
    whole.stats(stats);
    CHECK(stats.slots_high == 24 && stats.slots_low == 24);
}

TEST_MAIN()
