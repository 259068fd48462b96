// engine/expert-store.h over a small GGUF: stories of acquire and release, and of failed reads, then everything at once.
#include "tiny-store.h"

#include <algorithm>
#include <numeric>
#include <random>

using namespace test;
using hobbit::expert_store;
using hobbit::precision;

namespace {

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

TEST("of two failures each tells its own reason") {
    tiny_store  s;
    std::string first, second;
    const auto  fail_at = [&](uint16_t e) {
        const wants got = s.acquire(0, { want(e) });
        s.wait_until([&] { return s.store().failed(); });
        s.store().io().drain();
        std::exception_ptr why;
        std::string        text;
        CHECK(s.store().take_error(why));
        status_of(why, text);
        s.store().release(got);
        return text;
    };
    s.cut_file();
    first  = fail_at(1);
    second = fail_at(6);
    CHECK(!first.empty() && first != second);  // another offset
    s.restore_file();
}

TEST("uses and loads of experts are counted, until the statistics are reset") {
    tiny_store s;
    s.pass(1, { want(3), want(5, need::high, 2) });
    s.pass(1, { want(3) });
    std::vector<uint64_t> uses, loads;
    s.store().expert_uses(1, uses, loads);
    CHECK(uses[3] == 2 && uses[5] == 2 && loads[3] == 1 && loads[5] == 1);
    s.store().reset_stats();
    s.store().expert_uses(1, uses, loads);
    CHECK(std::accumulate(uses.begin(), uses.end(), (uint64_t) 0) == 0);
    CHECK(std::accumulate(loads.begin(), loads.end(), (uint64_t) 0) == 0);
}

TEST_MAIN()
