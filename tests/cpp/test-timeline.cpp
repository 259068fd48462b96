// engine/timeline.h: which tokens are kept, and what of them.
#include "engine/timeline.h"

#include "test.h"

#include <algorithm>
#include <thread>

using hobbit::timeline;

namespace {

// One token with a read in block `block`, taking about `ms`.
void token(timeline & t, uint32_t block, int ms, uint32_t n_tokens = 1) {
    t.begin();
    t.batch(n_tokens);
    const auto now = timeline::clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(ms));
    t.add(HOBBIT_EVENT_READ, block, now, timeline::clock::now(), 42);
    t.end();
}

const hobbit_event * find(const std::vector<hobbit_event> & events, uint32_t kind) {
    const auto at = std::find_if(events.begin(), events.end(), [=](const hobbit_event & e) { return e.kind == kind; });
    return at == events.end() ? nullptr : &*at;
}

}  // namespace

TEST("off, nothing is kept") {
    timeline t;
    token(t, 1, 1);
    CHECK(t.events(false).empty() && t.events(true).empty());
}

TEST("the last token and the slowest are kept, whole") {
    timeline t;
    t.enable(true);
    token(t, 1, 2);
    token(t, 2, 200);  // a busy machine may make the others longer too
    token(t, 3, 2);
    CHECK_EQ(find(t.events(false), HOBBIT_EVENT_READ)->block, 3u);
    CHECK_EQ(find(t.events(true), HOBBIT_EVENT_READ)->block, 2u);
    for (const bool slowest : { false, true }) {
        const auto           events = t.events(slowest);
        const hobbit_event * read   = find(events, HOBBIT_EVENT_READ);
        const hobbit_event * decode = find(events, HOBBIT_EVENT_DECODE);
        CHECK_EQ(events.size(), 2u);
        CHECK_EQ(read->bytes, 42u);
        CHECK(decode->begin == 0.0 && 0.0 <= read->begin && read->begin < read->end && read->end <= decode->end);
    }
    t.enable(true);
    CHECK(t.events(false).empty());
}

TEST("a batch is not a token, nor are two batches in one decode") {
    timeline t;
    t.enable(true);
    token(t, 1, 1, 2);
    t.begin();
    t.batch(1);
    t.batch(1);
    t.end();
    t.begin();  // failed before the first router
    t.end();
    CHECK(t.events(false).empty());
    token(t, 4, 1);
    CHECK_EQ(find(t.events(false), HOBBIT_EVENT_READ)->block, 4u);
}

TEST("what began before the token is cut, what ended before is left out, what comes between tokens too") {
    timeline   t;
    const auto before = timeline::clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto middle = timeline::clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    t.enable(true);
    t.add(HOBBIT_EVENT_READ, 1, before, middle);
    t.begin();
    t.batch(1);
    t.add(HOBBIT_EVENT_READ, 2, before, middle);
    t.add(HOBBIT_EVENT_PREFETCH, 3, before, timeline::clock::now());
    t.end();
    const auto events = t.events(false);
    CHECK_EQ(events.size(), 2u);
    CHECK(find(events, HOBBIT_EVENT_READ) == nullptr && find(events, HOBBIT_EVENT_PREFETCH)->begin == 0.0);
}

TEST("without brackets a router opens a token and the next closes it") {
    timeline t;
    t.enable(true);
    t.batch(1);
    t.add(HOBBIT_EVENT_ROUTE, 7, timeline::clock::now(), timeline::clock::now());
    CHECK(t.events(false).empty());
    t.batch(1);
    CHECK_EQ(find(t.events(false), HOBBIT_EVENT_ROUTE)->block, 7u);
}

TEST("there is room for so many events") {
    timeline t;
    t.enable(true);
    t.begin();
    t.batch(1);
    for (size_t i = 0; i < timeline::MAX_EVENTS + 10; ++i) {
        t.add(HOBBIT_EVENT_STALL, 0, timeline::clock::now(), timeline::clock::now());
    }
    t.end();
    CHECK_EQ(t.events(false).size(), timeline::MAX_EVENTS + 1);
}

TEST_MAIN()
