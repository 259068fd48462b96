// engine/layer-pass.h: what becomes of the selections of a batch, and the work of several threads on them.
#include "engine/layer-pass.h"

#include "tiny-store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

using namespace test;
using hobbit::layer_pass;
using hobbit::pass_item;
using hobbit::pass_row;
using hobbit::precision;
using hobbit::policy::serving;

namespace {

// Random selections of `n_tokens` tokens, `k` of 8 experts each, with room between the rows as ggml may leave it.
struct batch {
    uint32_t             n_tokens, k, stride;
    std::vector<int32_t> ids;
    std::vector<float>   weights;

    batch(std::mt19937 & random, uint32_t n_tokens, uint32_t k) :
        n_tokens(n_tokens),
        k(k),
        stride(k + (uint32_t) (random() % 3)),
        ids(n_tokens * stride, -1),
        weights(n_tokens * stride, 1e9f) {
        std::exponential_distribution<float> weight(1.0f);
        std::vector<int32_t>                 experts(8);
        std::iota(experts.begin(), experts.end(), 0);
        for (uint32_t t = 0; t < n_tokens; ++t) {
            std::shuffle(experts.begin(), experts.end(), random);
            for (uint32_t j = 0; j < k; ++j) {
                ids[t * stride + j]     = experts[j];
                weights[t * stride + j] = weight(random);
            }
        }
    }

    int32_t id(const pass_row & r) const { return ids[(size_t) r.token * stride + (size_t) r.slot]; }

    float weight(const pass_row & r) const { return weights[(size_t) r.token * stride + (size_t) r.slot]; }

    layer_pass::selections selections() const {
        layer_pass::selections s;
        s.ids            = ids.data();
        s.ids_stride     = stride;
        s.weights        = weights.data();
        s.weights_stride = stride;
        s.k              = k;
        s.n_tokens       = n_tokens;
        return s;
    }
};

constexpr hobbit::policy::thresholds T = { 0.5f, 0.8f };

class pass_story : public tiny_store {
  public:
    explicit pass_story(const store_setup & setup) : tiny_store(setup), pass(store(), index()) {}

    void build(uint32_t l, const batch & b, precision_rule rule, bool renormalize = true) {
        serving how;
        how.rule        = rule;
        how.t           = T;
        how.renormalize = renormalize;
        build(l, b, how);
    }

    void build(uint32_t l, const batch & b, const serving & how) {
        layer = l;
        out.assign(b.n_tokens * b.k, -1.0f);
        pass.build(l, b.selections(), how, nullptr, out.data());
    }

    // (slot, token) -> its item, NULL when skipped. Each row exactly once, with its expert.
    std::map<std::pair<int, int>, const pass_item *> rows(const batch & b) const {
        std::map<std::pair<int, int>, const pass_item *> found;
        uint32_t                                         first = 0;
        for (const pass_item & item : pass.items()) {
            CHECK_EQ(item.first_row, first);
            CHECK(item.n_rows > 0);
            for (uint32_t r = first; r < first + item.n_rows; ++r) {
                const pass_row row = pass.rows()[r];
                CHECK_EQ(b.id(row), item.expert);
                CHECK(found.insert({ { row.slot, row.token }, &item }).second);
            }
            first += item.n_rows;
        }
        CHECK_EQ(first, pass.rows().size());
        for (const pass_row & row : pass.skipped()) {
            CHECK(found.insert({ { row.slot, row.token }, nullptr }).second);
        }
        CHECK_EQ(found.size(), (size_t) b.n_tokens * b.k);
        for (const auto & [row, item] : found) {
            CHECK(row.first >= 0 && row.first < (int) b.k && row.second >= 0 && row.second < (int) b.n_tokens);
        }
        return found;
    }

    // All slices of the pass have the bytes of their experts, read by `n` threads as ggml/mul-mat-id.cpp does it: in pieces taken
    // from an item, or (`tiled`) with a share of each item for each thread.
    void work(int n, bool tiled) {
        for (uint32_t part = 0; part < n_parts(); ++part) {
            std::vector<std::atomic<int>> read(pass.items().size());
            pass.begin_streams(part);
            on_threads(n, [&](int i) { work_on(part, i, n, tiled, read); });
            for (const auto & pieces : read) {
                CHECK(store().failed() || pieces.load() == (tiled ? n : PIECES));
            }
        }
    }

    uint32_t           layer = 0;
    layer_pass         pass;
    std::vector<float> out;

  private:
    static constexpr int PIECES = 5;

    void read_piece(uint32_t part, const pass_item & item, const std::byte * slice, int piece, int n) const {
        const uint64_t bytes = index().layers()[layer].projections[part].source[(int) item.prec].slice;
        check_slice(slice, layer, item.expert, item.prec, part, bytes * (uint64_t) piece / (uint64_t) n,
                    bytes * (uint64_t) (piece + 1) / (uint64_t) n);
    }

    // True when this thread is through with the item.
    bool advance(uint32_t part, size_t i, int ith, int n, bool tiled, std::vector<std::atomic<int>> & read) {
        const pass_item &      item     = pass.items()[i];
        layer_pass::progress & progress = pass.at(part, i);
        const std::byte *      slice    = pass.slice(part, i);
        if (slice == nullptr) {
            return progress.next.load(std::memory_order_relaxed) > 0;
        }
        if (tiled) {
            read_piece(part, item, slice, ith, n);
            read[i]++;
            if (progress.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
                pass.item_done(part, i);
            }
            return true;
        }
        while (true) {
            const int32_t piece = progress.next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= PIECES) {
                return true;
            }
            read_piece(part, item, slice, piece, PIECES);
            read[i]++;
            if (progress.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == PIECES) {
                pass.item_done(part, i);
            }
        }
    }

    void work_on(uint32_t part, int ith, int n, bool tiled, std::vector<std::atomic<int>> & read) {
        std::vector<size_t> left(pass.items().size());
        std::iota(left.begin(), left.end(), (size_t) 0);
        while (!left.empty() && !store().failed()) {
            const uint64_t seen   = store().arrivals();
            const size_t   before = left.size();
            left.erase(
                std::remove_if(left.begin(), left.end(), [&](size_t i) { return advance(part, i, ith, n, tiled, read); }),
                left.end());
            if (!left.empty() && left.size() == before) {
                store().wait(seen);
            }
        }
    }
};

// The needs of a token's selections, by the pure function.
std::vector<need> needs_of(const batch & b, uint32_t token) {
    std::vector<need> out(b.k);
    hobbit::policy::classify(&b.weights[token * b.stride], b.k, T, out.data(), nullptr);
    return out;
}

template <typename F>
void on_random_batches(pass_story & s, precision_rule rule, bool renormalize, F && check) {
    std::mt19937 random(1 + (uint32_t) rule);
    for (int i = 0; i < 300; ++i) {
        const batch b(random, 1 + (uint32_t) (random() % 9), 1 + (uint32_t) (random() % 4));
        s.build((uint32_t) (random() % 3), b, rule, renormalize);
        const auto rows = s.rows(b);
        for (uint32_t token = 0; token < b.n_tokens; ++token) {
            const auto needs = needs_of(b, token);
            for (uint32_t j = 0; j < b.k; ++j) {
                check(b, (int) j, (int) token, needs[j], rows.at({ (int) j, (int) token }));
            }
        }
        s.check_counts();
    }
}

}  // namespace

TEST("by the exact rule every row has its expert in high precision and its weight bit for bit") {
    pass_story s(slots(6, 2));
    on_random_batches(s, precision_rule::exact, true, [&](const batch & b, int j, int token, need, const pass_item * item) {
        CHECK(item != nullptr && item->prec == precision::high);
        const float got = s.out[(size_t) token * b.k + (size_t) j], is = b.weight({ j, token });
        CHECK_EQ(memcmp(&got, &is, sizeof(float)), 0);
    });
    CHECK(!s.pass.uses(precision::low));
    CHECK_EQ(s.total().mass_low + s.total().mass_skipped, 0.0);
}

TEST("by the weight rule every row has the precision of its own need") {
    pass_story s(slots(5, 3));
    on_random_batches(s, precision_rule::weight, true, [&](const batch &, int, int, need n, const pass_item * item) {
        CHECK_EQ(item == nullptr, n == need::skip);
        CHECK(item == nullptr || (item->prec == precision::high) == (n == need::high));
    });
    CHECK(s.total().mass_low > 0.0 && s.total().mass_skipped > 0.0);
}

TEST("by the miss rule a high need is served in high precision, and only what may be skipped is") {
    pass_story s(slots(5, 3));
    on_random_batches(s, precision_rule::miss, true, [&](const batch &, int, int, need n, const pass_item * item) {
        CHECK(item != nullptr || n == need::skip);
        CHECK(item == nullptr || n != need::high || item->prec == precision::high);
    });
    CHECK(s.total().mass_low > 0.0 && s.total().mass_skipped > 0.0);
}

TEST("skipped rows weigh nothing, and the others as much as before together") {
    for (const auto rule : { precision_rule::miss, precision_rule::weight }) {
        for (const bool renormalize : { true, false }) {
            pass_story s(slots(5, 3));
            on_random_batches(s, rule, renormalize, [&](const batch & b, int j, int token, need, const pass_item * item) {
                const float got = s.out[(size_t) token * b.k + (size_t) j];
                CHECK(item != nullptr || got == 0.0f);
                CHECK(item == nullptr || renormalize || got == b.weight({ j, token }));
                float before = 0.0f, after = 0.0f;
                for (int i = 0; i < (int) b.k; ++i) {
                    before += b.weight({ i, token });
                    after += s.out[(size_t) token * b.k + (size_t) i];
                }
                CHECK(!renormalize || std::abs(after - before) <= 1e-5f * before);
            });
        }
    }
}

TEST("a token with nothing skipped keeps its weights bit for bit") {
    pass_story   s(slots(8, 2));
    std::mt19937 random(7);
    batch        b(random, 1, 2);
    b.weights = { 0.61f, 0.52f, 0.0f, 0.0f };  // the second has a score of 0.54: low
    s.build(0, b, precision_rule::miss);
    CHECK_EQ(s.pass.skipped().size(), 0u);
    CHECK(s.pass.uses(precision::low) && s.pass.uses(precision::high));
    CHECK(s.out[0] == 0.61f && s.out[1] == 0.52f);
}

TEST("masses are shares of the router weight, one for each token") {
    pass_story   s(slots(8, 4));
    std::mt19937 random(7);
    batch        b(random, 1, 3);
    b.weights = { 2.0f, 1.0f, 1.0f, 0.0f, 0.0f };  // scores 0, 0.5, 0.75: high, high, low
    s.build(0, b, precision_rule::weight);
    b.weights = { 2.4f, 0.9f, 0.7f, 0.0f, 0.0f };  // scores 0, 0.6, 0.825: high, low, skip
    s.build(1, b, precision_rule::weight);
    const hobbit_counts c = s.total();
    CHECK(std::abs(c.mass_total - 2.0) < 1e-6);
    CHECK(std::abs(c.mass_low - (1.0 / 4 + 0.9 / 4)) < 1e-6);
    CHECK(std::abs(c.mass_skipped - 0.7 / 4) < 1e-6);
}

TEST("costs are (a g)^2 of what may be low, and of what of it was") {
    pass_story   s(slots(8, 4));
    std::mt19937 random(7);
    batch        b(random, 1, 4);
    b.weights = { 4.0f, 3.0f, 2.0f, 1.0f, 0.0f };
    serving how;
    how.rule        = precision_rule::miss;
    how.sensitivity = std::make_shared<const std::vector<float>>(std::vector<float> { 1.0f, 0.5f, 0.5f });
    const auto cost = [&](uint32_t layer, hobbit::policy::thresholds t) {
        const hobbit_counts before = s.total();
        how.t                      = t;
        s.build(layer, b, how);
        const hobbit_counts after = s.total();
        return std::make_pair(after.cost_asked - before.cost_asked, after.cost_low - before.cost_low);
    };
    const auto is = [](std::pair<double, double> got, double asked, double low) {
        return std::abs(got.first - asked) < 1e-6 && std::abs(got.second - low) < 1e-6;
    };
    CHECK(is(cost(0, { 0.65f, 0.85f }), 0.3 * 0.3 + 0.2 * 0.2, 0.3 * 0.3 + 0.2 * 0.2));  // high, low, low, skip
    s.build(1, b, precision_rule::exact);                                                // all cached in high precision
    CHECK(is(cost(1, { 0.87f, 0.85f }), 0.1 * 0.1, 0.0));                                // high, high, low, skip
    how.sensitivity = nullptr;
    CHECK(is(cost(0, { 0.3f, 0.8f }), 0.0, 0.0));
}

TEST("without weights all is in high precision") {
    pass_story             s(slots(8, 2));
    std::mt19937           random(7);
    const batch            b(random, 4, 3);
    layer_pass::selections sel = b.selections();
    sel.weights                = nullptr;
    for (const auto rule : { precision_rule::exact, precision_rule::miss, precision_rule::weight, precision_rule::drop }) {
        serving how;
        how.rule          = rule;
        how.t             = T;
        how.drop_fraction = 3.0f;
        how.max_experts   = 1;
        s.pass.build(0, sel, how, nullptr, nullptr);
        for (const auto & [row, item] : s.rows(b)) {
            CHECK(item != nullptr && item->prec == precision::high);
        }
    }
    CHECK_EQ(s.total().mass_total, 0.0);
}

TEST("the drop rule leaves out what is light and not there, and reads nothing in low precision") {
    pass_story   s(slots(8, 2));
    std::mt19937 random(7);
    batch        b(random, 1, 3);
    b.weights = { 0.1f, 0.6f, 0.3f, 0.0f, 0.0f };
    serving how;
    how.rule          = precision_rule::drop;
    how.drop_fraction = 0.9f;  // limits at 0.3 of the router weight
    s.build(0, b, how);
    CHECK_EQ(s.pass.skipped().size(), 1u);
    CHECK_EQ(s.pass.skipped()[0].slot, 0);
    CHECK(std::abs(s.out[0]) == 0.0f && std::abs(s.out[1] - 0.6f / 0.9f) < 1e-6f);
    CHECK(!s.pass.uses(precision::low));
    s.build(0, b, precision_rule::exact);
    s.work(1, false);  // now all three are there
    s.build(0, b, how);
    CHECK_EQ(s.pass.skipped().size(), 0u);
    CHECK(s.out[0] == 0.1f && s.out[1] == 0.6f && s.out[2] == 0.3f);
    s.check_counts();
}

TEST("with fewer experts a token, the largest stay, whatever is there and whoever else wants them") {
    for (const auto rule : { precision_rule::exact, precision_rule::miss, precision_rule::weight, precision_rule::drop }) {
        pass_story   s(slots(8, 3));
        std::mt19937 random(11);
        serving      how;
        how.rule          = rule;
        how.t             = { 1.0f, 1.0f };
        how.drop_fraction = 0.0f;
        for (int i = 0; i < 200; ++i) {
            const batch b(random, 1 + (uint32_t) (random() % 5), 4);
            how.max_experts = (uint32_t) (random() % 6);
            s.build((uint32_t) (random() % 3), b, how);
            const uint32_t kept = how.limits(4) ? how.max_experts : 4;
            const auto     rows = s.rows(b);
            for (int token = 0; token < (int) b.n_tokens; ++token) {
                uint32_t n     = 0;
                float    least = 1e9f, most = -1.0f, sum = 0.0f, total = 0.0f;
                for (int j = 0; j < 4; ++j) {
                    const float w = b.weight({ j, token });
                    total += w;
                    sum += s.out[(size_t) token * 4 + (size_t) j];
                    if (rows.at({ j, token }) != nullptr) {
                        n++;
                        least = std::min(least, w);
                    } else {
                        most = std::max(most, w);
                    }
                }
                CHECK_EQ(n, kept);
                CHECK(least >= most);
                CHECK(std::abs(sum - total) <= 1e-5f * total);
            }
            s.check_counts();
        }
    }
}

TEST("random batches by the drop rule") {
    pass_story   s(slots(5, 0));
    std::mt19937 random(5);
    serving      how;
    how.rule          = precision_rule::drop;
    how.drop_fraction = 0.8f;
    for (int i = 0; i < 300; ++i) {
        const batch b(random, 1 + (uint32_t) (random() % 9), 1 + (uint32_t) (random() % 4));
        s.build((uint32_t) (random() % 3), b, how);
        for (const auto & [row, item] : s.rows(b)) {
            std::vector<need> needs(b.k);
            hobbit::policy::classify_drop(&b.weights[(size_t) row.second * b.stride], b.k, 0.8f, needs.data());
            CHECK(item != nullptr || needs[(size_t) row.first] == need::skip);
            CHECK(item == nullptr || item->prec == precision::high);
        }
        s.check_counts();
    }
    CHECK(s.total().skips > 0 && s.total().mass_low == 0.0);
}

TEST("what is there is computed first, what has no slot last") {
    pass_story   s(slots(3, 0));
    std::mt19937 random(3);
    const batch  one(random, 1, 2);
    s.build(1, one, precision_rule::exact);
    s.work(1, false);
    batch all(random, 2, 4);
    std::iota(all.ids.begin(), all.ids.end(), 0);
    all.stride = 4;
    s.build(1, all, precision_rule::exact);  // 8 experts, 2 of them there, 1 more slot
    std::vector<std::string> order;
    for (const pass_item & item : s.pass.items()) {
        const bool was_there = item.expert == one.ids[0] || item.expert == one.ids[1];
        order.push_back(item.entry == nullptr ? "streamed" : was_there ? "there" : "coming");
    }
    CHECK(order == std::vector<std::string>(
                       { "there", "there", "coming", "streamed", "streamed", "streamed", "streamed", "streamed" }));
}

TEST("a pass lets go of its experts when the next is built, and at release") {
    pass_story   s(slots(4, 0));
    std::mt19937 random(4);
    for (uint32_t layer = 0; layer < 3; ++layer) {  // 4 slots, 4 experts each time
        s.build(layer, batch(random, 1, 4), precision_rule::exact);
        CHECK(std::all_of(s.pass.items().begin(), s.pass.items().end(),
                          [](const pass_item & i) { return i.entry != nullptr; }));
        s.work(1, false);
    }
    s.pass.release();
    CHECK(s.pass.items().empty());
    s.pass.release();
    const wants got = s.tiny_store::pass(0, { want(0), want(1), want(2), want(3) });
    CHECK(std::all_of(got.begin(), got.end(), [](const expert_want & w) { return w.entry != nullptr; }));
}

TEST("several threads see every slice of a pass, streamed ones too") {
    for (const bool tiled : { false, true }) {
        for (const int n_threads : { 1, 2, 3 }) {
            pass_story   s(slots(2, 1));  // of up to 8 experts in two precisions: most are streamed
            std::mt19937 random(5);
            for (int i = 0; i < 40; ++i) {
                const auto rule = (precision_rule) (i % 3);
                s.build((uint32_t) (random() % 3), batch(random, 1 + (uint32_t) (random() % 12), 4), rule);
                s.work(n_threads, tiled);
            }
        }
    }
}

TEST("threads leave a pass whose reads fail, and the next one works") {
    pass_story   s(slots(2, 0));
    std::mt19937 random(6);
    s.cut_file();
    s.build(0, batch(random, 8, 4), precision_rule::exact);
    s.work(3, false);
    CHECK(s.store().failed());
    s.settle();
    std::exception_ptr why;
    CHECK(s.store().take_error(why));
    s.pass.release();
    s.restore_file();
    s.build(0, batch(random, 8, 4), precision_rule::exact);
    s.work(3, false);
    CHECK(!s.store().failed());
}

TEST("what was read ahead in time is a load all the same: who reads ahead goes on") {
    pass_story   s(slots(4));
    std::mt19937 random(1);
    batch        b(random, 1, 1);
    b.ids[0] = 5;
    s.store().prefetch(1, 1, { want(5) });
    s.wait_until([&] { return s.stats().resident_high == 1; });
    s.build(1, b, precision_rule::exact);
    CHECK_EQ(s.pass.n_loads(), 1u);
    s.build(1, b, precision_rule::exact);
    CHECK_EQ(s.pass.n_loads(), 0u);
    s.pass.release();
}

TEST("gains are left as they are, whatever is skipped") {
    pass_story   s(slots(4));
    std::mt19937 random(1);
    batch        b(random, 1, 3);
    b.weights[0] = 0.8f, b.weights[1] = 0.15f, b.weights[2] = 0.05f;
    layer_pass::selections sel = b.selections();
    serving                how;
    how.rule = precision_rule::weight;
    how.t    = T;
    std::vector<float> out(3);
    for (const bool gains : { false, true }) {
        sel.gains = gains;
        s.pass.build(0, sel, how, nullptr, out.data());
        CHECK(s.pass.skipped().size() > 0);
        CHECK_EQ(out[0] == 0.8f, gains);
    }
    s.pass.release();
}

TEST_MAIN()
