// cache/foresight.h: what the tokens so far tell.
#include "cache/foresight.h"

#include "test.h"

#include <cmath>
#include <vector>

using namespace hobbit;

namespace {

constexpr uint32_t N_LAYER = 3, N_EXPERT = 8, K = 2;

// A text of tokens 0..3: token t chooses the experts 2t and 2t+1 in every layer.
struct reader {
    std::vector<std::byte> pool = std::vector<std::byte>(N_LAYER * N_EXPERT);
    cache_shape            shape { N_LAYER, N_EXPERT, { N_LAYER * N_EXPERT, 0 }, { 1, 1 } };
    expert_cache           cache { shape, pool.data(), { priority_foresight } };
    foresight              memory { cache, N_LAYER, N_EXPERT, (float) K / N_EXPERT };

    void read(const std::vector<int32_t> & text) {
        std::vector<int32_t> ids;
        for (int32_t token : text) {
            ids.insert(ids.end(), { 2 * token, 2 * token + 1 });
        }
        for (uint32_t layer = 0; layer < N_LAYER; ++layer) {
            memory.observe(layer, ids.data(), K, K, (uint32_t) text.size());
        }
    }

    float seen(int32_t token, int from) { return cache.use(1, (uint32_t) (2 * token)).seen[from]; }
};

bool near(float a, float b) { return std::fabs(a - b) < 1e-3f; }

}  // namespace

TEST("before the first token every expert is as likely as the others") {
    reader r;
    r.memory.refresh();
    CHECK(near(r.seen(0, 0), 0.25f * FORESIGHT_TOTAL));
    CHECK(near(r.cache.use(2, 7).rate, 0.25f));
}

TEST("rates follow what is used") {
    reader r;
    r.read({ 0 });
    CHECK(near(r.cache.use(0, 0).recent, 0.25f * 0.6f + 0.4f));
    CHECK(near(r.cache.use(0, 0).rate, 0.25f * 0.99f + 0.01f));
    CHECK(near(r.cache.use(0, 2).recent, 0.25f * 0.6f));
    r.memory.begin_sequence();
    CHECK_EQ(r.cache.use(0, 0).recent, r.cache.use(0, 0).rate);
}

TEST("what followed a token before is expected after it again") {
    reader r;
    for (int i = 0; i < 30; ++i) {
        r.read({ 0, 1, 2, 3 });
    }
    r.read({ 0 });
    r.memory.refresh();
    // 1, 2, 3, 0, 1 ... are next: token 1 now and every four tokens, 2 one later, and so on.
    const float every_fourth = 1.0f / (1.0f - std::pow(FORESIGHT_GAMMA, 4.0f));
    CHECK(std::fabs(r.seen(1, 0) - every_fourth) < 0.05f);
    CHECK(std::fabs(r.seen(2, 0) - FORESIGHT_GAMMA * every_fourth) < 0.05f);
    // From the token after: 2 comes first.
    CHECK(std::fabs(r.seen(2, 1) - every_fourth) < 0.05f);
    CHECK(r.seen(1, 0) > r.seen(2, 0) && r.seen(2, 0) > r.seen(3, 0) && r.seen(3, 0) > r.seen(0, 0));
    CHECK(r.seen(2, 1) > r.seen(3, 1) && r.seen(3, 1) > r.seen(0, 1) && r.seen(0, 1) > r.seen(1, 1));
}

TEST("tokens of a batch count as if they had come one by one") {
    reader one, batch;
    for (int i = 0; i < 40; ++i) {
        one.read({ i % 4 });
    }
    std::vector<int32_t> text;
    for (int i = 0; i < 40; ++i) {
        text.push_back(i % 4);
    }
    batch.read(text);
    one.memory.refresh();
    batch.memory.refresh();
    for (uint32_t e = 0; e < N_EXPERT; ++e) {
        CHECK_EQ(one.cache.use(1, e).rate, batch.cache.use(1, e).rate);
        CHECK_EQ(one.cache.use(1, e).seen[0], batch.cache.use(1, e).seen[0]);
        CHECK_EQ(one.cache.use(1, e).seen[1], batch.cache.use(1, e).seen[1]);
    }
}

TEST("a text longer than the history, in batches larger than it too") {
    reader               r;
    std::vector<int32_t> text;
    for (uint32_t i = 0; i < foresight::HISTORY + 100; ++i) {
        text.push_back((int32_t) (i % 3));
    }
    r.read(text);
    r.read(text);
    r.read({ 0 });
    r.memory.refresh();
    CHECK(r.seen(1, 0) > r.seen(2, 0) && r.seen(2, 0) > r.seen(0, 0) && r.seen(0, 0) > r.seen(3, 0));
}

// One layer of 8 experts, of which 4 have a slot. What is asked for goes in, and out goes what the test says; -1: nothing.
struct one_layer {
    std::vector<std::byte> pool = std::vector<std::byte>(4);
    cache_shape            shape { 1, N_EXPERT, { 4, 0 }, { 1, 1 } };
    expert_cache           cache { shape, pool.data(), { priority_foresight } };
    foresight              memory { cache, 1, N_EXPERT, 0.25f };

    void read(int32_t expert, int32_t out) {
        memory.observe(0, &expert, 1, 1, 1);
        if (cache.find(0, (uint32_t) expert, 0) == nullptr) {
            if (out >= 0) {
                cache.remove(cache.find(0, (uint32_t) out, 0));
            }
            cache.fulfil(cache.insert(0, (uint32_t) expert, 0, {}));
        }
        memory.refresh();
    }
};

TEST("where LRU would have more, priorities go over to its order, and come back where it would not") {
    one_layer    r;
    const auto & memory = r.memory;
    auto &       cache  = r.cache;
    const auto   read   = [&](int32_t expert, int32_t out) { r.read(expert, out); };
    for (int32_t e = 0; e < 4; ++e) {
        read(e, -1);
    }
    CHECK_EQ(memory.recency(), 0.0f);
    // 4 and 5 by turns, each of which throws the other out, where LRU would throw out 0 and 1.
    read(4, 3);
    for (int i = 0; i < 10; ++i) {
        read(i % 2 == 0 ? 5 : 4, i % 2 == 0 ? 4 : 5);
    }
    CHECK(memory.recency() > 0.9f);
    CHECK_EQ(memory.clock(), 15u);
    // One after the other, of which 0 to 2 stay: hits that LRU would not have.
    for (int i = 0; i < 64; ++i) {
        const int32_t last = cache.find(0, 4, 0) != nullptr   ? 4
                             : cache.find(0, 5, 0) != nullptr ? 5
                             : cache.find(0, 6, 0) != nullptr ? 6
                                                              : 7;
        read(i % 8, i % 8 >= 3 ? (cache.find(0, 3, 0) != nullptr ? 3 : last) : -1);
    }
    CHECK(memory.recency() < 0.1f);
}

TEST("of a prompt nothing is judged, though its last layer is computed for one token alone") {
    std::vector<std::byte> pool(8);
    cache_shape            shape { 2, N_EXPERT, { 8, 0 }, { 1, 1 } };
    expert_cache           cache { shape, pool.data(), { priority_foresight } };
    foresight              memory { cache, 2, N_EXPERT, 0.25f };
    for (uint32_t i = 0; i < 8; ++i) {
        cache.fulfil(cache.insert(i % 2, i / 2, 0, {}));
    }
    const auto token = [&](int32_t expert) {
        for (uint32_t layer = 0; layer < 2; ++layer) {
            memory.observe(layer, &expert, 1, 1, 1);
        }
        memory.refresh();
    };
    for (int i = 0; i < 20; ++i) {
        token(4 + i % 2);  // that are never there
    }
    const float before = memory.recency();
    CHECK(before > 0.5f);
    const std::vector<int32_t> prompt(50, 0);
    memory.observe(0, prompt.data(), 1, 1, 50);
    memory.observe(1, prompt.data(), 1, 1, 1);
    memory.refresh();
    CHECK_EQ(memory.recency(), before);
}

TEST("of a prompt the last layer is computed for its last tokens") {
    reader                     r;
    const std::vector<int32_t> prompt { 0, 1, 2, 3, 4, 5 }, last { 6, 7 };  // three tokens
    r.memory.observe(0, prompt.data(), K, K, 3);
    r.memory.observe(1, prompt.data(), K, K, 3);
    r.memory.observe(2, last.data(), K, K, 1);
    CHECK_EQ(r.cache.use(1, 0).used_at, 1u);
    CHECK_EQ(r.cache.use(2, 6).used_at, r.memory.clock());
}

TEST("what was read ahead says nothing of LRU") {
    one_layer r;
    for (int32_t e = 0; e < 4; ++e) {
        r.read(e, -1);
    }
    r.read(4, 3);
    for (int i = 0; i < 10; ++i) {
        r.read(i % 2 == 0 ? 5 : 4, i % 2 == 0 ? 4 : 5);
    }
    const float before = r.memory.recency();
    CHECK(before > 0.9f);
    for (int32_t e : { 0, 1, 2 }) {  // LRU has lost them: were they hits, it would be behind
        r.cache.find(0, (uint32_t) e, 0)->prefetched = true;
        r.read(e, -1);
    }
    CHECK_EQ(r.memory.recency(), before);
}

TEST("what was used a whole history ago takes no room in LRU's order") {
    constexpr uint32_t     N = 64;
    std::vector<std::byte> pool(8);
    cache_shape            shape { 1, N, { 8, 0 }, { 1, 1 } };
    expert_cache           cache { shape, pool.data(), { priority_foresight } };
    foresight              memory { cache, 1, N, 0.1f };
    const auto             take = [&](uint32_t expert, uint32_t place_of) {
        cache.remove(cache.find(0, place_of, 0));
        cache.fulfil(cache.insert(0, expert, 0, {}));
    };
    const auto use = [&](int32_t expert) {
        memory.observe(0, &expert, 1, 1, 1);
        memory.refresh();
    };
    for (uint32_t e = 0; e < N; ++e) {  // each once
        use((int32_t) e);
        if (e < 8) {
            cache.fulfil(cache.insert(0, e, 0, {}));
        }
    }
    while (memory.clock() < foresight::HISTORY) {
        use(0);
    }
    use(1), use(2), use(3);
    for (uint32_t e : { 1u, 2u, 3u }) {
        take(40 + e, e);  // where LRU would not
    }
    while (memory.clock() < foresight::HISTORY + N + 8) {
        use(0);
    }
    CHECK_EQ(memory.recency(), 0.0f);
    use(1), use(2), use(3);  // of the last 70 tokens four experts, which LRU has
    CHECK(memory.recency() > 0.4f);
}

TEST_MAIN()
