// replay/sim-disk.h: when reads end, by hand, and whose turn it is.
#include "replay/sim-disk.h"

#include "test.h"

#include <cmath>

using namespace hobbit;

namespace {

struct ended {
    uint32_t   part;
    double     time;
    io_outcome outcome;
};

constexpr double NEVER = std::numeric_limits<double>::infinity();

// 1000 bytes a second, blocks of 100 bytes, half a second before each transfer.
disk_model slow(uint32_t depth, double latency = 0.5) {
    disk_model m;
    m.bandwidth = 1000.0;
    m.latency   = latency;
    m.depth     = depth;
    m.block     = 100;
    return m;
}

class reading {
  public:
    explicit reading(const disk_model & model) :
        disk(model,
             [this](const io_request & r, io_outcome o, std::exception_ptr) { log.push_back({ r.part, disk.now(), o }); }) {}

    static io_request read(uint32_t part, uint64_t bytes) {
        io_request r;
        r.part  = part;
        r.bytes = bytes;
        return r;
    }

    bool ends(size_t i, uint32_t part, double time, io_outcome outcome = io_outcome::done) const {
        return i < log.size() && log[i].part == part && std::fabs(log[i].time - time) < 1e-9 && log[i].outcome == outcome;
    }

    std::vector<ended> log;
    sim_disk           disk;
};

}  // namespace

TEST("with a queue depth of 1 every read pays its latency") {
    reading s(slow(1));
    s.disk.demand({ reading::read(1, 100), reading::read(2, 200) });
    CHECK_EQ(s.disk.demand_pending(), 2u);
    s.disk.advance(10.0);
    CHECK(s.log.size() == 2 && s.ends(0, 1, 0.6) && s.ends(1, 2, 1.3));
    CHECK(s.disk.demand_pending() == 0 && s.disk.next_event() == NEVER && s.disk.now() == 10.0);
}

TEST("latencies of reads side by side overlap, transfers do not") {
    reading s(slow(4));
    s.disk.demand({ reading::read(1, 100), reading::read(2, 200), reading::read(3, 100) });
    CHECK(s.disk.next_event() == 0.6);
    s.disk.advance(0.6);
    CHECK(s.log.size() == 1);
    s.disk.drain();
    CHECK(s.ends(0, 1, 0.6) && s.ends(1, 2, 0.8) && s.ends(2, 3, 0.9));
}

TEST("a prefetch goes block by block and stands back for demand") {
    reading s(slow(2, 0.0));
    s.disk.prefetch({ reading::read(1, 250) });
    s.disk.advance(0.15);  // in its second block
    s.disk.demand({ reading::read(2, 300) });
    s.disk.advance(5.0);
    // The block that was begun ends at 0.2, then the demand read, then the last 50 bytes.
    CHECK(s.log.size() == 2 && s.ends(0, 2, 0.5) && s.ends(1, 1, 0.55));
}

TEST("a prefetch that is cancelled ends after its block, one that is wanted by then goes on") {
    for (const bool wanted : { false, true }) {
        std::atomic<bool> cancel { false }, urgent { false };
        reading           s(slow(1, 0.0));
        io_request        r = reading::read(1, 250);
        r.cancel            = &cancel;
        r.urgent            = &urgent;
        s.disk.prefetch({ r });
        s.disk.advance(0.05);
        cancel = true;
        urgent = wanted;
        s.disk.advance(5.0);
        CHECK(s.log.size() == 1);
        CHECK(wanted ? s.ends(0, 1, 0.25) : s.ends(0, 1, 0.1, io_outcome::cancelled));
        CHECK_EQ(s.disk.demand_pending(), 0u);
    }
}

TEST("queued prefetches are promoted or withdrawn by their owner") {
    reading    s(slow(1, 0.0));
    const int  a = 0, b = 0;
    io_request of_a = reading::read(1, 100), of_b = reading::read(2, 100);
    of_a.owner = (void *) &a;
    of_b.owner = (void *) &b;
    s.disk.demand({ reading::read(0, 100) });
    s.disk.prefetch({ of_a, of_b });
    s.disk.promote(&b);
    CHECK_EQ(s.disk.demand_pending(), 2u);
    CHECK_EQ(s.disk.withdraw(&a).size(), 1u);
    s.disk.drain();
    CHECK(s.log.size() == 2 && s.ends(0, 0, 0.1) && s.ends(1, 2, 0.2));
}

TEST("who waits for the end of all reads waits for no prefetch that has not begun") {
    reading s(slow(1, 0.0));
    s.disk.prefetch({ reading::read(1, 250), reading::read(2, 100) });
    s.disk.advance(0.05);  // in the first block of the first
    s.disk.demand({ reading::read(3, 100) });
    s.disk.drain();
    CHECK(s.log.size() == 1 && s.ends(0, 3, 0.2));
    s.disk.advance(5.0);
    CHECK(s.log.size() == 3 && s.ends(1, 1, 0.35) && s.ends(2, 2, 0.45));
}

TEST("without a bandwidth all is there at once") {
    reading s(disk_model {});
    s.disk.demand({ reading::read(1, 1 << 30), reading::read(2, 1 << 30) });
    s.disk.advance(0.0);
    CHECK(s.log.size() == 2 && s.ends(1, 2, 0.0));
}

TEST("as many prefetches at a time as allowed") {
    reading s(slow(4, 0.0));
    s.disk.set_max_prefetch(1);
    s.disk.prefetch({ reading::read(1, 200), reading::read(2, 100) });
    s.disk.advance(5.0);
    CHECK(s.ends(0, 1, 0.2) && s.ends(1, 2, 0.3));
}

TEST_MAIN()
