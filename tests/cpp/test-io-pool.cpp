// io/io-pool.h: real files, real threads. What has to happen in an order is held at a gate in the handler, never slept for.
#include "io/io-pool.h"

#include "base/error.h"

#include "temp-folder.h"
#include "test.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <thread>

using namespace hobbit;

namespace {

constexpr uint64_t BLOCK     = PAGE;
constexpr uint64_t FILE_SIZE = 512 * BLOCK + 100;  // the end stands in the middle of a block
constexpr char     UNTOUCHED = 0x5A;

struct ended {
    uint32_t    part;
    io_outcome  outcome;
    uint64_t    bytes;
    uint64_t    done;
    std::string why;
};

// A pool on a file of known contents, and words for what is asked of it. A part is held at the gate when its handler runs, that is on
// the reader thread, after the read.
class reading {
  public:
    explicit reading(bool direct, uint32_t n_threads = 1, uint32_t max_prefetch = 1, uint64_t size = FILE_SIZE) :
        size_(size), n_threads_(n_threads) {
        test::write_all(folder_.path("data"), test::content(7, size));
        file_ = std::make_unique<file>(folder_.path("data"), direct);
        pool_ = std::make_unique<io_pool>(
            n_threads, BLOCK, max_prefetch,
            [this](const io_request & r, io_outcome o, std::exception_ptr why) { on_end(r, o, why); });
    }

    ~reading() { close(); }

    void close() {
        open_gate();
        pool_.reset();
    }

    // Part `part`: the bytes [offset, offset + n) of the file, into a room of its own.
    io_request read(uint32_t part, uint64_t offset, uint64_t n, const void * owner = nullptr) {
        region & room = rooms_[part];
        room          = region(align_up(n, PAGE), true);
        std::fill_n((char *) room.data(), room.size(), UNTOUCHED);
        io_request r = request_of(*file_, { 0, offset, n }, room.data());
        r.owner      = (void *) owner;
        r.part       = part;
        return r;
    }

    io_request whole(uint32_t part) { return read(part, 0, size_); }

    io_request small(uint32_t part, const void * owner = nullptr) { return read(part, part * BLOCK, BLOCK, owner); }

    // All reader threads wait at the gate, so that what is queued from now on stays queued.
    void hold_readers() {
        std::vector<io_request> requests;
        for (uint32_t i = 0; i < n_threads_; ++i) {
            hold(HELD + i);
            requests.push_back(small(HELD + i));
        }
        for (io_request & r : requests) {
            r.offset = 0;
        }
        pool().demand(requests);
        for (uint32_t i = 0; i < n_threads_; ++i) {
            wait_for(HELD + i);
        }
    }

    void let_readers_go() {
        for (uint32_t i = 0; i < n_threads_; ++i) {
            release(HELD + i);
        }
    }

    void hold(uint32_t part) {
        std::lock_guard<std::mutex> lock(mutex_);
        held_.insert(part);
    }

    void open_gate() {
        std::lock_guard<std::mutex> lock(mutex_);
        held_.clear();
        changed_.notify_all();
    }

    void release(uint32_t part) {
        std::lock_guard<std::mutex> lock(mutex_);
        held_.erase(part);
        changed_.notify_all();
    }

    // Until the handler of the part was called (it may be at the gate still).
    ended wait_for(uint32_t part) {
        std::unique_lock<std::mutex> lock(mutex_);
        const ended *                found = nullptr;
        changed_.wait(lock, [&] {
            for (const ended & e : log_) {
                found = e.part == part ? &e : found;
            }
            return found != nullptr;
        });
        return *found;
    }

    // The parts whose handlers were called, in that order, without those of hold_readers().
    std::vector<uint32_t> order() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<uint32_t>       out;
        for (const ended & e : log_) {
            if (e.part < HELD) {
                out.push_back(e.part);
            }
        }
        return out;
    }

    // Until the first block of a running read is there, seen without a lock: a race by design. Asleep in between: on a single CPU the
    // reader would otherwise be through before we look.
    __attribute__((no_sanitize("thread"))) void wait_for_first_block(const io_request & r) {
        while (*(volatile char *) (r.dst + BLOCK - 1) == UNTOUCHED && *(volatile char *) (r.dst + BLOCK - 2) == UNTOUCHED) {
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
    }

    static bool right(const io_request & r, uint64_t from, uint64_t to) {
        for (uint64_t i = from; i < std::min(to, r.src->size() - r.offset); ++i) {
            if ((unsigned char) r.dst[i] != test::byte_at(7, r.offset + i)) {
                return false;
            }
        }
        return true;
    }

    static bool right(const io_request & r) { return right(r, 0, r.must_have); }

    static bool untouched(const io_request & r, uint64_t from) {
        return std::all_of(r.dst + from, r.dst + r.bytes, [](std::byte b) { return (char) b == UNTOUCHED; });
    }

    io_pool & pool() { return *pool_; }

    std::string path() const { return folder_.path("data"); }

    std::function<void(uint32_t part)> when_ended;  // on the reader thread

  private:
    static constexpr uint32_t HELD = 1000;

    void on_end(const io_request & r, io_outcome outcome, std::exception_ptr why) {
        ended e { r.part, outcome, r.bytes, r.done, "" };
        if (why) {
            try {
                std::rethrow_exception(why);
            } catch (const error & x) {
                e.why = x.status() == HOBBIT_ERR_READ ? x.what() : "not HOBBIT_ERR_READ";
            }
        }
        if (when_ended) {
            when_ended(r.part);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        log_.push_back(e);
        changed_.notify_all();
        changed_.wait(lock, [&] { return held_.count(r.part) == 0; });
    }

    test::temp_folder          folder_;
    std::map<uint32_t, region> rooms_;
    std::unique_ptr<file>      file_;
    uint64_t                   size_;
    uint32_t                   n_threads_;

    std::mutex              mutex_;
    std::condition_variable changed_;
    std::vector<ended>      log_;
    std::set<uint32_t>      held_;

    std::unique_ptr<io_pool> pool_;
};

using parts = std::vector<uint32_t>;

// A race that cannot be made to happen for sure, since a reader may have ended before we act: tried until it happened.
void until(const std::function<bool()> & attempt) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (std::chrono::steady_clock::now() < end) {
        if (attempt()) {
            return;
        }
    }
    test::fail(__FILE__, __LINE__, "it never happened");
}

}  // namespace

TEST("demand and prefetch read the right bytes, direct and buffered, up to the end of the file") {
    for (const bool direct : { false, true }) {
        reading                 r(direct, 3, 2);
        std::vector<io_request> requests = { r.read(0, 0, 10), r.read(1, 4095, 2), r.read(2, 12345, 54321),
                                             r.read(3, FILE_SIZE - 1, 1), r.read(4, 4096, 3 * BLOCK) };
        std::vector<io_request> ahead    = { r.read(5, 777, 50000), r.read(6, FILE_SIZE - 5000, 5000), r.whole(7) };
        r.pool().demand(requests);
        r.pool().prefetch(ahead);
        requests.insert(requests.end(), ahead.begin(), ahead.end());
        for (const io_request & q : requests) {
            CHECK(r.wait_for(q.part).outcome == io_outcome::done);
            CHECK(reading::right(q));
        }
        CHECK_EQ(r.order().size(), requests.size());
    }
}

TEST("demand requests are read in the order they were asked for") {
    reading r(false);
    r.hold_readers();
    r.pool().demand({ r.small(3), r.small(1) });
    r.pool().demand({ r.small(2) });
    r.open_gate();
    r.wait_for(2);
    CHECK(r.order() == parts({ 3, 1, 2 }));
}

TEST("a demand request goes before prefetches that were queued earlier") {
    reading r(false);
    r.hold_readers();
    r.pool().prefetch({ r.small(1), r.small(2) });
    r.pool().demand({ r.small(3) });
    r.open_gate();
    r.wait_for(2);
    CHECK(r.order() == parts({ 3, 1, 2 }));
}

TEST("demand_pending counts what is queued and what is running") {
    reading r(false);
    r.hold_readers();
    CHECK_EQ(r.pool().demand_pending(), 1u);
    r.pool().demand({ r.small(1), r.small(2) });
    r.pool().prefetch({ r.small(3) });
    CHECK_EQ(r.pool().demand_pending(), 3u);
    r.open_gate();
    r.wait_for(1), r.wait_for(2), r.wait_for(3);
    r.pool().drain();
    CHECK_EQ(r.pool().demand_pending(), 0u);
}

TEST("who waits until nothing is read does not wait for what is queued ahead") {
    until([] {
        reading r(false, 2, 2);
        r.hold_readers();
        r.pool().prefetch({ r.small(0), r.small(1), r.small(2) });
        r.pool().demand({ r.small(50) });
        r.hold(0), r.hold(1);
        std::atomic<bool> drained { false };
        std::thread       waiting([&] {
            r.pool().drain();
            drained = true;
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(!drained);
        r.let_readers_go();
        r.wait_for(50);
        for (int i = 0; i < 1000 && !drained; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        const bool in_time = drained;
        r.open_gate();
        waiting.join();
        r.wait_for(0), r.wait_for(1), r.wait_for(2);  // and afterwards it goes on
        CHECK_EQ(r.order()[0], 50u);
        return in_time;
    });
}

TEST("a prefetch begins while the last two demand reads are running, and not before") {
    reading r(false, 4, 1);
    for (uint32_t part : { 1, 2, 3 }) {
        r.hold(part);
    }
    r.pool().demand({ r.small(1), r.small(2), r.small(3) });
    r.wait_for(1), r.wait_for(2), r.wait_for(3);
    r.pool().prefetch({ r.small(4) });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(r.order().size(), 3u);
    r.release(2);
    r.wait_for(4);
    CHECK_EQ(r.pool().demand_pending(), 2u);
    r.open_gate();
}

TEST("no more prefetches run than allowed, however many readers are idle") {
    reading r(false, 3, 1);
    r.hold(1);
    r.pool().prefetch({ r.small(1), r.small(2) });
    r.wait_for(1);
    r.pool().demand({ r.small(3), r.small(4), r.small(5) });
    r.wait_for(3), r.wait_for(4), r.wait_for(5);
    const parts order = r.order();
    CHECK(std::find(order.begin(), order.end(), 2u) == order.end());
    r.open_gate();
    r.wait_for(2);
}

TEST("a promoted prefetch is read as a demand, the others stay behind") {
    reading   r(false);
    const int mine = 0, other = 0;
    r.hold_readers();
    r.pool().prefetch({ r.small(1, &other), r.small(2, &mine), r.small(3, &other), r.small(4, &mine) });
    r.pool().demand({ r.small(5) });
    r.pool().promote(&mine);
    CHECK_EQ(r.pool().demand_pending(), 4u);
    r.open_gate();
    r.wait_for(3);
    CHECK(r.order() == parts({ 5, 2, 4, 1, 3 }));
}

TEST("withdrawn prefetches are not read, and their parts are told") {
    reading   r(false);
    const int mine = 0, other = 0;
    r.hold_readers();
    const io_request gone = r.small(1, &mine);
    r.pool().prefetch({ gone, r.small(2, &other), r.small(3, &mine) });
    const std::vector<io_request> taken = r.pool().withdraw(&mine);
    CHECK(taken.size() == 2 && taken[0].part == 1 && taken[1].part == 3);
    CHECK(r.pool().withdraw(&mine).empty());
    r.pool().prefetch({ r.small(4, &other) });
    r.open_gate();
    r.wait_for(4);
    CHECK(r.order() == parts({ 2, 4 }));
    CHECK(reading::untouched(gone, 0));
}

TEST("a prefetch cancelled before it starts reads nothing, unless somebody waits for it") {
    reading                 r(false);
    const std::atomic<bool> yes { true };
    io_request              q = r.whole(1), awaited = r.whole(2);
    q.cancel = awaited.cancel = awaited.urgent = &yes;
    r.pool().prefetch({ q, awaited });
    const ended e = r.wait_for(1);
    CHECK(e.outcome == io_outcome::cancelled && e.done == 0);
    CHECK(reading::untouched(q, 0));
    CHECK(r.wait_for(2).outcome == io_outcome::done);
    CHECK(reading::right(awaited));
}

TEST("a running prefetch stops between two blocks when it is cancelled") {
    until([] {
        reading           r(false);
        std::atomic<bool> cancel { false };
        io_request        q = r.whole(1);
        q.cancel            = &cancel;
        r.pool().prefetch({ q });
        r.wait_for_first_block(q);
        cancel        = true;
        const ended e = r.wait_for(1);
        if (e.outcome == io_outcome::done) {
            return false;  // it was faster than us
        }
        CHECK(e.outcome == io_outcome::cancelled);
        CHECK(e.done >= BLOCK && e.done < q.bytes && e.done % BLOCK == 0);
        CHECK(reading::right(q, 0, e.done));
        CHECK(reading::untouched(q, e.done));
        return true;
    });
}

TEST("a running prefetch stands back for a demand request, then goes on where it was") {
    until([] {
        reading          r(false);
        const io_request ahead = r.whole(1), demand = r.small(2);
        // On the only reader thread: nobody reads into `ahead` now.
        r.when_ended = [&](uint32_t part) {
            if (part == 2) {
                std::fill_n((char *) ahead.dst, BLOCK, UNTOUCHED);
            }
        };
        r.pool().prefetch({ ahead });
        r.wait_for_first_block(ahead);
        r.pool().demand({ demand });
        CHECK(r.wait_for(1).outcome == io_outcome::done);
        CHECK(r.wait_for(2).outcome == io_outcome::done);
        if (r.order() == parts({ 1, 2 })) {
            return false;  // it was faster than us
        }
        CHECK(reading::right(demand));
        CHECK(*(char *) ahead.dst == UNTOUCHED);  // the first block was not read again
        CHECK(reading::right(ahead, BLOCK, ahead.must_have));
        return true;
    });
}

TEST("a running prefetch that somebody waits for does not stand back") {
    reading           r(false);
    std::atomic<bool> urgent { true };
    io_request        q = r.whole(1);
    q.urgent            = &urgent;
    r.pool().prefetch({ q });
    r.wait_for_first_block(q);
    r.pool().demand({ r.small(2) });
    r.wait_for(2);
    CHECK(r.order() == parts({ 1, 2 }));
    CHECK(reading::right(q));
}

TEST("a read of a file that was cut short fails and says where") {
    for (const bool direct : { false, true }) {
        reading r(direct);
        std::filesystem::resize_file(r.path(), 8 * BLOCK);
        for (const bool ahead : { false, true }) {
            const io_request q = r.read(ahead, 8 * BLOCK, BLOCK);
            ahead ? r.pool().prefetch({ q }) : r.pool().demand({ q });
            const ended e = r.wait_for(ahead);
            CHECK(e.outcome == io_outcome::failed);
            CHECK(e.why.find(r.path()) != std::string::npos);
            CHECK(e.why.find("offset " + std::to_string(8 * BLOCK)) != std::string::npos);
        }
        const io_request good = r.small(2);  // the pool lives on
        r.pool().demand({ good });
        CHECK(r.wait_for(2).outcome == io_outcome::done);
        CHECK(reading::right(good));
    }
}

TEST("a pool that goes away drops what is queued and calls nobody afterwards") {
    for (int i = 0; i < 20; ++i) {
        reading                 r(false, 2, 1);
        std::vector<io_request> requests, ahead;
        for (uint32_t part = 0; part < 40; ++part) {
            (part % 2 ? ahead : requests).push_back(r.small(part));
        }
        r.pool().prefetch(ahead);
        r.pool().demand(requests);
        r.close();
        const parts    order = r.order();
        const std::set once(order.begin(), order.end());
        CHECK_EQ(once.size(), order.size());
        for (const auto & all : { requests, ahead }) {
            for (const io_request & q : all) {
                CHECK(once.count(q.part) ? reading::right(q) : true);
            }
        }
    }
}

TEST("a large demand request is read in pieces and ends once, in the order it was asked for") {
    constexpr uint64_t LARGE = 3 * io_pool::PIECE + 5 * PAGE + 100;
    for (const bool direct : { false, true }) {
        for (const uint32_t n_threads : { 1, 3 }) {
            reading    reads(direct, n_threads, 1, LARGE);
            io_request first = reads.whole(0), second = reads.whole(1);
            second.done = 2 * PAGE;  // as of a prefetch that stood back
            reads.pool().demand({ first, second });
            for (const io_request & q : { first, second }) {
                const ended e = reads.wait_for(q.part);
                CHECK(e.outcome == io_outcome::done);
                CHECK_EQ(e.bytes, q.bytes);
                CHECK(reading::right(q, q.done, q.must_have));
            }
            reads.pool().drain();
            CHECK_EQ(reads.order().size(), 2u);
            CHECK(n_threads > 1 || reads.order() == parts({ 0, 1 }));  // several may end their last pieces in any order
            CHECK_EQ(reads.pool().demand_pending(), 0u);
        }
    }
    reading          reads(false, 3, 1, LARGE);
    const io_request r = reads.whole(0);
    CHECK_EQ(truncate(reads.path().c_str(), io_pool::PIECE), 0);
    reads.pool().demand({ r });
    reads.pool().drain();
    CHECK(reads.order() == parts({ 0 }));
    CHECK(reads.wait_for(0).outcome == io_outcome::failed);
    CHECK(!reads.wait_for(0).why.empty());
}

TEST_MAIN()
