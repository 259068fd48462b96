// engine/expert-store.h over a small GGUF: stories of acquire and release, of prefetches and of failed reads, then everything at once.
#include "tiny-store.h"

#include <algorithm>
#include <numeric>
#include <random>

using namespace test;
using hobbit::expert_store;
using hobbit::precision;

namespace {

store_setup slots(uint32_t high, uint32_t low = 0) {
    store_setup s;
    s.slots_high = high;
    s.slots_low  = low;
    return s;
}

// Prefetches stay queued until somebody asks for them: what comes too late, comes too late for sure.
store_setup no_prefetch_reads(store_setup s) {
    s.params.prefetch_reads = 0;
    return s;
}

bool hit(const expert_want & w) {
    return w.entry != nullptr && (w.action == action::use_high || w.action == action::use_low);
}

bool loaded(const expert_want & w) {
    return w.entry != nullptr && (w.action == action::load_high || w.action == action::load_low);
}

hobbit_status status_of(std::exception_ptr why, std::string & text) {
    try {
        std::rethrow_exception(why);
    } catch (const hobbit::error & e) {
        text = e.what();
        return e.status();
    }
}

}  // namespace

TEST("an expert is read when it is first asked for, and is there the second time") {
    tiny_store s;
    CHECK(loaded(s.pass(0, { want(3) })[0]));
    CHECK_EQ(s.stats().resident_high, 1u);
    CHECK(hit(s.pass(0, { want(3) })[0]));
    CHECK_EQ(s.total().loads_high, 1u);
    CHECK_EQ(s.total().hits_high, 1u);
    CHECK_EQ(s.stats().n_tokens, 2u);
    CHECK(s.total().bytes_demand >= s.expert_bytes(precision::high));
    CHECK_EQ(s.total().bytes_prefetch, 0u);
}

TEST("all that is missing is requested at once, and is right in every projection") {
    for (const uint32_t direct : { 0u, 1u }) {
        store_setup setup      = slots(4, 4);
        setup.params.direct_io = direct;
        tiny_store s(setup);
        for (uint32_t layer = 0; layer < 3; ++layer) {
            const wants got = s.acquire(layer, { want(7), want(0), want(4, need::low), want(2, need::low) });
            CHECK_EQ(std::count_if(got.begin(), got.end(), loaded), 4);
            s.arrive(got);  // no other call is made
            s.check(layer, got);
            s.store().release(got);
        }
        CHECK_EQ(s.total().loads_high, 6u);
        CHECK_EQ(s.total().loads_low, 6u);
    }
}

TEST("under pressure the least recently used expert goes") {
    tiny_store s(slots(2));
    s.pass(0, { want(0) });
    s.pass(0, { want(1) });
    s.pass(0, { want(2) });  // for 0
    CHECK(hit(s.pass(0, { want(1) })[0]));
    CHECK(loaded(s.pass(0, { want(0) })[0]));  // for 2
    CHECK(loaded(s.pass(0, { want(2) })[0]));
    CHECK_EQ(s.stats().resident_high, 2u);
}

TEST("what a pass holds is not evicted by the pass itself") {
    tiny_store s(slots(3));
    s.pass(0, { want(0), want(1), want(2) });
    const wants got = s.pass(0, { want(5), want(0), want(2) });  // 1 has to go, though 0 is as old
    CHECK(loaded(got[0]) && hit(got[1]) && hit(got[2]));
}

TEST("experts that find no slot are streamed") {
    tiny_store  s(slots(2));
    const wants got = s.acquire(1, { want(0), want(1), want(2), want(3, need::low) });
    CHECK(loaded(got[0]) && loaded(got[1]));
    for (const int i : { 2, 3 }) {
        CHECK(got[(size_t) i].entry == nullptr);
        CHECK(got[(size_t) i].action == (i == 2 ? action::load_high : action::load_low));
        s.stream(1, got[(size_t) i], (size_t) i);
    }
    s.arrive(got);
    s.check(1, got);  // streaming touched none of the slots
    s.store().release(got);
    CHECK_EQ(s.total().loads_high, 3u);
    CHECK_EQ(s.total().loads_low, 1u);
}

TEST("by the miss rule a resident high copy serves a low need, an absent one is read low or skipped") {
    tiny_store s(slots(2, 2));
    s.pass(0, { want(0), want(1, need::low) });
    const wants got = s.pass(0, { want(0, need::low), want(1, need::low), want(2, need::skip), want(3, need::low) });
    CHECK(got[0].action == action::use_high && hit(got[0]));
    CHECK(got[1].action == action::use_low && hit(got[1]));
    CHECK(got[2].action == action::skip && got[2].entry == nullptr);
    CHECK(got[3].action == action::load_low && loaded(got[3]));
    CHECK(s.pass(0, { want(1) })[0].action == action::load_high);  // a low copy does not serve a high need
    CHECK_EQ(s.total().skips, 1u);
    s.check_counts();
}

TEST("in a batch the first selection is the load, the others are hits") {
    tiny_store s(slots(2, 2));
    s.pass(0, { want(0, need::high, 5), want(1, need::low, 3), want(2, need::skip, 2) });
    const hobbit_counts c = s.total();
    CHECK(c.loads_high == 1 && c.hits_high == 4 && c.loads_low == 1 && c.hits_low == 2 && c.skips == 2);
    CHECK_EQ(c.selections, 10u);
}

TEST("with room for every expert in high precision, nothing is read a second time") {
    tiny_store s(slots(3 * 8));
    s.pass(0, { want(0), want(1, need::low) });
    const wants again = s.pass(0, { want(0), want(1, need::low) });
    CHECK(hit(again[0]));
    CHECK(hit(again[1]));
}

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
            s.store().acquire(layer, precision_rule::miss, layer == 0 ? n : 0, w);
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

TEST("a prefetch that is whole when its expert is asked for was useful") {
    tiny_store s;
    CHECK_EQ(s.store().prefetch(0, 1, { want(5) }), 1u);
    s.wait_until([&] { return s.stats().resident_high == 1; });
    CHECK(hit(s.pass(0, { want(5) })[0]));
    const hobbit_counts c = s.total();
    CHECK(c.prefetches == 1 && c.prefetches_useful == 1 && c.prefetches_late == 0 && c.prefetches_wasted == 0);
    CHECK(c.bytes_prefetch >= s.expert_bytes(precision::high) && c.bytes_demand == 0);
    s.pass(0, { want(5) });
    CHECK_EQ(s.total().prefetches_useful, 1u);  // counted once
}

TEST("a prefetch that is asked for while it is queued becomes a demand") {
    tiny_store s(no_prefetch_reads(slots(4)));
    CHECK_EQ(s.store().prefetch(0, 1, { want(5), want(6) }), 2u);
    const wants got = s.pass(0, { want(6), want(5) });
    CHECK(hit(got[0]) && hit(got[1]));
    const hobbit_counts c = s.total();
    CHECK(c.prefetches == 2 && c.prefetches_late == 2 && c.prefetches_useful == 0 && c.prefetches_wasted == 0);
    CHECK(c.bytes_prefetch == 0 && c.bytes_demand >= 2 * s.expert_bytes(precision::high));
}

TEST("prefetches that the router did not choose are dropped and their slots free at once") {
    tiny_store s(no_prefetch_reads(slots(4)));
    CHECK_EQ(s.store().prefetch(0, 1, { want(1), want(2) }), 2u);
    const wants got = s.acquire(0, { want(3), want(4), want(5), want(6) });
    CHECK_EQ(std::count_if(got.begin(), got.end(), loaded), 4);
    s.arrive(got);
    s.check(0, got);
    s.store().release(got);
    CHECK_EQ(s.total().prefetches_wasted, 2u);
    s.check_counts();
}

TEST("what was read ahead before a reset is not wasted after it, and what is under way counts anew") {
    tiny_store s;
    s.store().prefetch(0, 1, { want(5) });
    s.wait_until([&] { return s.stats().resident_high == 1; });
    s.store().reset_stats();
    s.pass(0, { want(0), want(1), want(2), want(3) });
    CHECK(s.total().prefetches_wasted == 0 && s.total().bytes_wasted == 0);
    s.check_counts();
    tiny_store late(no_prefetch_reads(slots(4)));
    late.store().prefetch(0, 1, { want(5) });
    late.store().reset_stats();
    late.pass(0, { want(6) });
    CHECK(late.total().prefetches == 1 && late.total().prefetches_wasted == 1);
    late.check_counts();
    CHECK(late.store().bytes_needed() == late.total().bytes_demand);
}

TEST("of prefetches that the router did not choose every byte was wasted, of those that were being read too") {
    tiny_store s(slots(4));
    for (uint16_t i = 0; i < 200; ++i) {
        const uint32_t layer = i % 3;
        s.store().prefetch(layer, 1, { want(1), want(2) });
        const auto all_there = [&] {
            const wants got = s.pass(layer, { want(3), want(4), want(5), want(6) });
            return std::all_of(got.begin(), got.end(), [](const expert_want & w) { return w.entry != nullptr; });
        };
        while (!all_there()) {  // a dropped prefetch may hold its slot until its block is read
            std::this_thread::yield();
        }
    }
    CHECK_EQ(s.total().prefetches_wasted, s.total().prefetches);
    CHECK_EQ(s.total().bytes_wasted, s.total().bytes_prefetch);
}

TEST("an expert that is predicted again while its dropped prefetch still reads is prefetched again") {
    std::atomic<bool> arrived { false }, go_on { false };
    store_setup       setup = slots(4);
    setup.params.io_threads = setup.params.prefetch_reads = 1;
    setup.on_arrival                                      = [&](uint32_t layer, uint32_t, precision, std::byte *) {
        arrived = arrived || layer == 1;
        while (layer == 1 && !go_on) {
            std::this_thread::yield();
        }
    };
    tiny_store s(setup);
    CHECK_EQ(s.store().prefetch(1, 1, { want(5) }), 1u);
    while (!arrived) {
        std::this_thread::yield();  // the first part is being read, the others are queued
    }
    s.store().release(s.acquire(1, {}));  // the router does not want it: the others are withdrawn
    CHECK_EQ(s.store().prefetch(1, 1, { want(5) }), 1u);
    CHECK_EQ(s.store().prefetch(1, 1, { want(5) }), 0u);  // now it is on its way
    go_on = true;
    s.wait_until([&] { return s.stats().resident_high == 1; });
    const hobbit_counts c = s.total();
    CHECK(c.prefetches == 2 && c.prefetches_wasted == 1 && c.bytes_demand == 0);
    CHECK(hit(s.pass(1, { want(5) })[0]));
    CHECK_EQ(s.total().prefetches_useful, 1u);
    s.check_counts();
}

TEST("prefetches of another layer are left alone") {
    tiny_store s(no_prefetch_reads(slots(4)));
    s.store().prefetch(1, 2, { want(1) });
    s.pass(0, { want(3) });
    CHECK(hit(s.pass(1, { want(1) })[0]));
    CHECK(s.total().prefetches_wasted == 0 && s.total().prefetches_late == 1);
}

TEST("a prefetch evicted without use was wasted, with its bytes") {
    tiny_store s(slots(2));
    s.store().prefetch(0, 0, { want(5) });
    s.wait_until([&] { return s.stats().resident_high == 1; });
    s.pass(1, { want(0), want(1) });
    CHECK_EQ(s.total().prefetches_wasted, 1u);
    CHECK_EQ(s.total().bytes_wasted, s.total().bytes_prefetch);
}

TEST("a prefetch takes at most half of what can be evicted, skips what may be skipped, and tells all that is missing") {
    tiny_store s(no_prefetch_reads(slots(4, 2)));
    CHECK_EQ(s.store().prefetch(1, 1, { want(0), want(1), want(2), want(3), want(4, need::skip), want(5, need::low) }), 5u);
    CHECK_EQ(s.total().prefetches, 2u + 1u);
}

TEST("a predicted expert that is there is protected until its layer has passed") {
    tiny_store s(slots(2));
    s.pass(0, { want(0) });
    s.pass(0, { want(1) });
    CHECK_EQ(s.store().prefetch(0, 1, { want(0) }), 0u);
    s.pass(1, { want(5) });  // 0 is the older one, but 1 goes
    CHECK(hit(s.pass(0, { want(0) })[0]));
    CHECK(loaded(s.pass(0, { want(1) })[0]));
}

TEST("what is predicted and there does not make room for what is predicted and missing") {
    for (const wants & predicted : { wants { want(5), want(0) }, wants { want(0), want(5) } }) {
        tiny_store s(slots(2));
        s.pass(0, { want(0) });
        s.pass(1, { want(1) });  // used later, but not predicted
        CHECK_EQ(s.store().prefetch(0, 1, predicted), 1u);
        CHECK(hit(s.pass(0, { want(0), want(5) })[0]));
        CHECK(s.total().loads_high == 2 && s.total().prefetches == 1);
    }
}

TEST("a guess more does not evict what is predicted") {
    tiny_store s(slots(2));
    s.pass(0, { want(0), want(1) });
    CHECK_EQ(s.store().prefetch(0, 1, { want(0), want(1), want(2) }), 1u);
    const wants got = s.pass(0, { want(0), want(1) });
    CHECK(hit(got[0]) && hit(got[1]) && s.total().prefetches == 0);
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

TEST("a new sequence keeps the contents, a reset of the statistics too") {
    tiny_store s;
    s.pass(0, { want(0) });
    s.store().begin_sequence();
    s.store().reset_stats();
    CHECK(s.total().selections == 0 && s.stats().n_tokens == 0);
    CHECK(hit(s.pass(0, { want(0) })[0]));
}

TEST("a read that fails stops the pass, and the store goes on when the file is whole again") {
    tiny_store s;
    s.pass(0, { want(0) });
    s.cut_file();
    const wants got = s.acquire(0, { want(0), want(1) });
    s.arrive(got);
    s.wait_until([&] { return s.store().failed(); });
    s.settle();
    std::exception_ptr why;
    std::string        text;
    CHECK(s.store().take_error(why));
    CHECK_EQ(status_of(why, text), HOBBIT_ERR_READ);
    CHECK(text.find(s.path()) != std::string::npos);
    CHECK(!s.store().failed() && !s.store().take_error(why));
    s.store().release(got);
    CHECK_EQ(s.stats().resident_high, 1u);
    s.restore_file();
    const wants again = s.pass(0, { want(0), want(1) });
    CHECK(hit(again[0]) && loaded(again[1]));
    CHECK(!s.store().failed());
    s.check_counts();
}

TEST("a streamed read that fails stops the pass too") {
    tiny_store s;
    s.cut_file();
    hobbit::stream_slot & slot = *s.store().stream_slots()[0];
    s.store().stream(2, 4, precision::high, 0, slot);
    s.wait_until([&] { return s.store().failed(); });
    CHECK(!slot.ready.load());
    s.settle();
    std::exception_ptr why;
    std::string        text;
    CHECK(s.store().take_error(why));
    CHECK_EQ(status_of(why, text), HOBBIT_ERR_READ);
    s.restore_file();
    expert_want w = want(4);
    w.action      = action::load_high;
    s.stream(2, w);
}

TEST("a prefetch that fails is nobody's error: the expert is simply not there") {
    tiny_store     s;
    const uint64_t before = s.store().arrivals();
    s.cut_file();
    s.store().prefetch(0, 1, { want(2) });
    s.wait_until([&] { return s.store().arrivals() == before + s.n_parts(); });
    CHECK(!s.store().failed());
    s.restore_file();
    CHECK(loaded(s.pass(0, { want(2) })[0]));
    CHECK(s.total().prefetches_wasted == 1 && s.total().bytes_wasted == s.total().bytes_prefetch);
    s.check_counts();
}

TEST("a store can be closed while reads are queued and running") {
    for (int i = 0; i < 30; ++i) {
        tiny_store s(slots(6, 2));
        s.store().prefetch(1, 1, { want(0), want(1), want(2) });
        s.store().prefetch(2, 1, { want(3, need::low) });
        s.store().release(s.acquire(0, { want(0), want(1) }));
    }
}

namespace {

wants random_wants(std::mt19937 & random) {
    std::vector<uint16_t> experts(8);
    std::iota(experts.begin(), experts.end(), (uint16_t) 0);
    std::shuffle(experts.begin(), experts.end(), random);
    wants out;
    for (size_t i = 0; i < 1 + random() % 5; ++i) {
        const need n = random() % 4 ? need::high : random() % 2 ? need::low : need::skip;
        out.push_back(want(experts[i], n, 1 + (uint32_t) (random() % 3)));
    }
    return out;
}

void random_pass(tiny_store & s, std::mt19937 & random, size_t stream_slot, int n_waiters) {
    const auto  layer = (uint32_t) (random() % 3);
    const auto  rule  = (precision_rule) (random() % 4);
    const wants got   = s.acquire(layer, random_wants(random), rule);
    on_threads(n_waiters, [&](int) {
        s.arrive(got);
        s.check(layer, got);
    });
    for (const expert_want & w : got) {
        if (w.entry == nullptr && w.action != action::skip) {
            s.stream(layer, w, stream_slot);
        }
    }
    s.store().release(got);
}

}  // namespace

TEST("every selection is counted once, with several threads waiting") {
    tiny_store   s(slots(5, 3));
    std::mt19937 random(11);
    for (int i = 0; i < 300; ++i) {
        random_pass(s, random, 0, 3);
        s.check_counts();
    }
    CHECK(s.total().selections > 300);
    CHECK(s.total().hits_high > 0 && s.total().hits_low > 0 && s.total().loads_low > 0 && s.total().skips > 0);
}

TEST("two threads acquire while a third prefetches: every slice is right") {
    for (const uint32_t direct : { 0u, 1u }) {
        store_setup setup      = slots(7, 3);
        setup.params.direct_io = direct;
        tiny_store       s(setup);
        std::atomic<int> running { 2 };
        on_threads(3, [&](int id) {
            std::mt19937 random((uint32_t) id);
            if (id == 2) {
                for (int i = 0; i < 100 || running.load() > 0; ++i) {
                    s.store().prefetch((uint32_t) (random() % 3), 1 + (uint32_t) (random() % 2), random_wants(random));
                    std::this_thread::yield();
                }
                return;
            }
            struct leaving {
                std::atomic<int> & n;

                ~leaving() { n--; }
            } leave { running };
            for (int i = 0; i < 300; ++i) {
                random_pass(s, random, (size_t) id, 1);
                if (i % 50 == 0) {
                    s.store().begin_sequence();
                }
            }
        });
        s.check_counts();
        CHECK(s.total().prefetches > 0);
    }
}

TEST_MAIN()
