#include "ggml/embedding-rows.h"
#include "test.h"

#include <atomic>
#include <thread>
#include <vector>

using namespace hobbit;

static std::vector<std::byte> row_of(int64_t i, size_t bytes) {
    std::vector<std::byte> row(bytes);
    for (size_t b = 0; b < bytes; ++b) {
        row[b] = (std::byte)(i * 31 + (int64_t) b);
    }
    return row;
}

TEST("a row is there after it was put, until another takes its place") {
    constexpr size_t       BYTES = 100;
    row_cache              cache(BYTES, 7);  // few rows: a place for each
    std::vector<std::byte> got(BYTES);
    CHECK(!cache.get(0, got.data()));
    for (int64_t i = 0; i < 7; ++i) {
        cache.put(i, row_of(i, BYTES).data());
    }
    for (int64_t i = 0; i < 7; ++i) {
        CHECK(cache.get(i, got.data()) && got == row_of(i, BYTES));
    }
    CHECK(!cache.get(7, got.data()));
    cache.put(7, row_of(7, BYTES).data());
    CHECK(cache.get(7, got.data()) && got == row_of(7, BYTES));
    CHECK(!cache.get(0, got.data()));
}

TEST("it holds so many bytes, and at least a row") {
    const uint64_t         large = row_cache::BYTES + 5;
    row_cache              one(large, 1000);
    std::vector<std::byte> got(large);
    one.put(3, row_of(3, large).data());
    one.put(4, row_of(4, large).data());
    CHECK(!one.get(3, got.data()));
    CHECK(one.get(4, got.data()) && got == row_of(4, large));
}

TEST("threads get whole rows") {
    constexpr size_t         BYTES = 4096;
    row_cache                cache(BYTES, 1 << 20);
    std::atomic<int>         wrong { 0 };
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            std::vector<std::byte> got(BYTES);
            for (int64_t n = 0; n < 4000; ++n) {
                const int64_t i = n % 3 * (int64_t) (row_cache::BYTES / BYTES);  // all in one place
                if (cache.get(i, got.data())) {
                    wrong += got != row_of(i, BYTES);
                } else {
                    cache.put(i, row_of(i, BYTES).data());
                }
            }
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    CHECK_EQ(wrong.load(), 0);
}

TEST_MAIN()
