// engine/expert-store-prefetch.cpp: what is read ahead, and what becomes of it.
#include "tiny-store.h"

#include <algorithm>

using namespace test;
using hobbit::precision;

namespace {

// Prefetches stay queued until somebody asks for them: what comes too late, comes too late for sure.
store_setup no_prefetch_reads(store_setup s) {
    s.params.prefetch_reads = 0;
    return s;
}

}  // namespace

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

TEST("what was read in vain was not needed") {
    tiny_store s(slots(2));
    s.store().prefetch(0, 0, { want(5) });
    s.wait_until([&] { return s.stats().resident_high == 1; });
    s.pass(1, { want(0), want(1) });
    CHECK(s.total().bytes_wasted > 0);
    CHECK_EQ(s.store().bytes_needed(), s.total().bytes_demand);
}

// One reader, which is held up when the second part of an expert of layer 1 arrives: the first has been counted by then.
static store_setup held_at_second_part(held_arrivals & held) {
    store_setup setup       = slots(4);
    setup.params.io_threads = setup.params.prefetch_reads = 1;
    setup.on_arrival = [&held, parts = 0](uint32_t layer, uint32_t, precision, std::byte *) mutable {
        if (layer == 1 && ++parts == 2) {
            held.hold();
        }
    };
    return setup;
}

TEST("of a prefetch that was dropped, predicted again and never used, no byte is wasted twice") {
    held_arrivals held;
    tiny_store    s(held_at_second_part(held));
    s.store().prefetch(1, 1, { want(5) });
    held.wait();
    s.store().release(s.acquire(1, {}));
    s.store().prefetch(1, 0, { want(5) });
    held.go = true;
    s.wait_until([&] { return s.stats().resident_high == 1; });
    s.pass(2, { want(0), want(1), want(2), want(3) });
    s.check_counts();
    CHECK_EQ(s.total().prefetches_wasted, 2u);
    CHECK_EQ(s.total().bytes_wasted, s.total().bytes_prefetch);
}

TEST("of a prefetch that is under way at a reset, what was read before counts with what is wasted of it") {
    held_arrivals held;
    tiny_store    s(held_at_second_part(held));
    s.store().prefetch(1, 1, { want(5) });
    held.wait();
    s.store().reset_stats();
    s.store().release(s.acquire(1, {}));  // the router does not want it
    const hobbit_counts c = s.total();
    held.go               = true;
    CHECK(c.bytes_wasted > 0 && c.bytes_prefetch >= c.bytes_wasted);
    s.store().io().drain();
    s.check_counts();
}

TEST_MAIN()
