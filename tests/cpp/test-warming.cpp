// An empty pool is filled by the heat of an earlier run.
#include "tiny-store.h"

#include <algorithm>

using namespace test;
using hobbit::precision;

namespace {

store_setup warm_slots(uint32_t high, uint32_t low = 0) {
    store_setup setup          = slots(high, low);
    setup.params.eviction_rule = HOBBIT_EVICT_FORESIGHT;
    return setup;
}

// Of 3 layers with 8 experts: expert e of layer l is the hotter the larger e and the smaller l are.
std::vector<hobbit_heat> some_heat(const tiny_store & s) {
    const uint32_t           n_expert = s.index().n_expert;
    std::vector<hobbit_heat> heat(s.index().layers().size() * n_expert);
    for (size_t i = 0; i < heat.size(); ++i) {
        heat[i] = { (float) (10 * (i % n_expert) + 5 - i / n_expert) / 100.0f, 0.5f };
    }
    return heat;
}

bool high_hit(const expert_want & w) { return w.entry != nullptr && w.action == action::use_high; }

uint64_t n_resident(tiny_store & s) { return s.stats().resident_high + s.stats().resident_low; }

}  // namespace

TEST("the hottest experts are read into free slots, as nobody's hits, misses or prefetches") {
    tiny_store s(warm_slots(9));
    s.store().warm(some_heat(s).data());
    s.wait_until([&] { return s.stats().warmed == 9; });
    const hobbit_stats before = s.stats();
    CHECK_EQ(before.resident_high, 9u);
    CHECK(before.bytes_warmed >= 9 * s.expert_bytes(precision::high));
    CHECK(before.total.prefetches == 0 && before.total.bytes_prefetch == 0 && before.total.bytes_demand == 0);
    for (uint32_t layer = 0; layer < 3; ++layer) {
        for (uint16_t expert = 5; expert < 8; ++expert) {
            CHECK(high_hit(s.pass(layer, { want(expert) })[0]));  // with the right bytes
        }
    }
    const hobbit_counts c = s.total();
    CHECK(c.hits_high == 9 && c.loads_high == 0 && c.bytes_demand == 0);
    CHECK(c.prefetches_useful == 0 && c.prefetches_late == 0 && c.prefetches_wasted == 0);
    s.check_counts();
}

TEST("nothing is evicted for it, and what is there is not read again") {
    tiny_store            s(warm_slots(12));
    std::vector<uint16_t> used = { 0, 1, 2, 3, 4, 5, 7 };
    for (const uint16_t e : used) {
        s.pass(0, { want(e) });
    }
    s.store().warm(some_heat(s).data());
    s.wait_until([&] { return s.stats().warmed == 5; });
    CHECK(s.stats().resident_high == 12 && s.stats().warmed == 5);
    for (const uint16_t e : used) {
        CHECK(high_hit(s.pass(0, { want(e) })[0]));
    }
    CHECK(high_hit(s.pass(1, { want(7) })[0]));
}

TEST("of equally hot experts those of the first layers come first") {
    tiny_store                     s(warm_slots(10));
    const std::vector<hobbit_heat> heat(3 * s.index().n_expert, { 0.0f, 1.0f });
    s.store().warm(heat.data());
    s.wait_until([&] { return s.stats().warmed == 10; });
    for (uint16_t e = 0; e < 8; ++e) {
        CHECK(high_hit(s.pass(0, { want(e) })[0]));
    }
    CHECK(high_hit(s.pass(1, { want(0) })[0]) && high_hit(s.pass(1, { want(1) })[0]));
}

TEST("what is next hottest goes into the low slots") {
    tiny_store s(warm_slots(4, 8));
    s.store().warm(some_heat(s).data());
    s.wait_until([&] { return s.stats().warmed == 12; });
    CHECK(s.stats().resident_high == 4 && s.stats().resident_low == 8);
    CHECK(high_hit(s.pass(0, { want(7) })[0]));
    const wants low = s.pass(0, { want(6, need::low) });
    CHECK(low[0].action == action::use_low || low[0].action == action::use_high);
}

TEST("demand and prefetches come first") {
    store_setup setup           = warm_slots(16);
    setup.params.io_threads     = 1;
    setup.params.prefetch_reads = 1;
    // What has arrived, in this order.
    std::mutex            mutex;
    std::vector<uint32_t> order;  // layers
    std::atomic<bool>     go { false };
    setup.on_arrival = [&](uint32_t layer, uint32_t, precision, std::byte *) {
        while (!go) {
            std::this_thread::yield();
        }
        std::lock_guard<std::mutex> lock(mutex);
        order.push_back(layer);
    };
    tiny_store s(setup);
    s.store().warm(some_heat(s).data());  // layers 0 and 1 are begun, the first slice of layer 0 is being read
    CHECK_EQ(s.store().prefetch(2, 1, { want(0) }), 1u);
    go = true;
    s.wait_until([&] { return s.stats().warmed >= 2; });
    std::lock_guard<std::mutex> lock(mutex);
    const size_t                n = s.n_parts();
    // At most the slice that was being read, then the prefetch, then the rest.
    const auto first = std::find(order.begin(), order.end(), 2u);
    CHECK(first - order.begin() <= 1 && order.size() >= 2 * n);
    CHECK(std::all_of(first, first + (ptrdiff_t) n, [](uint32_t layer) { return layer == 2; }));
}

TEST("an expert that is demanded while it is being read is late for nobody, and counted as demanded") {
    held_arrivals held;
    store_setup   setup = warm_slots(16);
    setup.on_arrival    = [&](uint32_t, uint32_t, precision, std::byte *) { held.hold(); };
    tiny_store s(setup);
    s.store().warm(some_heat(s).data());
    wants got = s.acquire(0, { want(7) });
    CHECK(high_hit(got[0]));
    held.go = true;
    s.arrive(got);
    s.check(0, got);
    s.store().release(got);
    s.wait_until([&] { return s.stats().warmed == 1; });  // the other one that had begun; no more do
    s.store().io().drain();
    CHECK(s.stats().warmed == 1 && s.stats().resident_high == 2);
    const hobbit_counts c = s.total();
    CHECK(c.bytes_demand >= s.expert_bytes(precision::high) && c.prefetches == 0 && c.prefetches_late == 0);
}

TEST("a failed read ends it, silently") {
    tiny_store s(warm_slots(16));
    s.cut_file();
    s.store().warm(some_heat(s).data());
    s.wait_until([&] { return s.store().arrivals() == 2 * s.n_parts(); });  // the two that had begun
    s.store().io().drain();
    CHECK(!s.store().failed() && s.stats().warmed == 0 && n_resident(s) == 0);
    CHECK_EQ(s.store().arrivals(), (uint64_t) 2 * s.n_parts());
    s.restore_file();
    s.pass(0, { want(7) });
    s.check_counts();
}

TEST("heat goes out as it came in, and follows what is used") {
    tiny_store                     s(warm_slots(16));
    const std::vector<hobbit_heat> in = some_heat(s);
    std::vector<hobbit_heat>       out;
    s.store().warm(in.data());
    CHECK(s.store().heat(out) && out.size() == in.size());
    for (size_t i = 0; i < in.size(); ++i) {
        CHECK(out[i].rate == in[i].rate && out[i].high_share == in[i].high_share);
    }
    const int32_t id = 3;
    s.store().observe(1, &id, 1, 1, 1);
    s.pass(1, { want(3) });
    CHECK(s.store().heat(out));
    const size_t at = s.index().n_expert + 3;
    CHECK(out[at].rate > in[at].rate && out[at].high_share > in[at].high_share && out[at + 1].rate < in[at + 1].rate);
}

TEST("rules that keep no rates have no heat") {
    tiny_store               s;
    std::vector<hobbit_heat> out;
    CHECK(!s.store().heat(out));
    CHECK_THROWS(s.store().warm(some_heat(s).data()));
}

TEST("the first layer that asks for experts ends it") {
    held_arrivals held;
    store_setup   setup = warm_slots(16);
    setup.on_arrival    = [&](uint32_t, uint32_t, precision, std::byte *) { held.hold(); };
    tiny_store s(setup);
    s.store().warm(some_heat(s).data());
    const wants got = s.acquire(0, { want(7) });
    held.go         = true;
    s.arrive(got);
    s.store().release(got);
    s.wait_until([&] { return s.stats().resident_high >= 2; });  // the two that had begun
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK_EQ(s.stats().resident_high, 2u);
}

TEST("a pool that a layer fills is not warmed: what is in flight would be in its way") {
    held_arrivals held;
    store_setup   setup = warm_slots(2);
    setup.on_arrival    = [&](uint32_t, uint32_t, precision, std::byte *) { held.hold(); };
    tiny_store s(setup);
    s.store().warm(some_heat(s).data());
    const wants got = s.acquire(0, { want(0), want(1) });
    held.go         = true;
    CHECK(loaded(got[0]) && loaded(got[1]));
    s.arrive(got);
    s.store().release(got);
}

TEST("a reset of the statistics forgets what was warmed") {
    tiny_store s(warm_slots(9));
    s.store().warm(some_heat(s).data());
    s.wait_until([&] { return s.stats().warmed == 9; });
    s.store().reset_stats();
    CHECK(s.stats().warmed == 0 && s.stats().bytes_warmed == 0);
}

TEST_MAIN()
