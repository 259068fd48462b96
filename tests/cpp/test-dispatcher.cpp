// engine/dispatcher.h with the reader threads and the prefetch thread: what compute threads, predictions, learning and somebody who looks at
// the statistics and resizes the pool do side by side. For ThreadSanitizer, and for the bytes that are served.
#include "engine/dispatcher.h"

#include "tiny-store.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

using namespace test;
using hobbit::dispatcher;
using hobbit::layer_pass;
using hobbit::pass_item;

namespace {

constexpr uint32_t N_EXPERT = 8;

// Routers that rotate their input: expert e of layer l has the logit x[(e + l) % 8].
class rotating_routers : public hobbit::router_source {
  public:
    explicit rotating_routers(uint32_t k, bool biased = false) : k_(k), biased_(biased) {}

    static constexpr float BIAS[N_EXPERT] = { 3.0f, -3.0f, 2.0f, -2.0f, 0.0f, 1.0f, -1.0f, 0.5f };

    bool shape(uint32_t, hobbit::policy::router_shape & out) override {
        out          = {};
        out.n_expert = N_EXPERT;
        out.k        = k_;
        return true;
    }

    bool logits(uint32_t, uint32_t to, const float * x, bool, float * out) override {
        for (uint32_t e = 0; e < N_EXPERT; ++e) {
            out[e] = x[(e + to) % N_EXPERT] + (biased_ ? BIAS[e] : 0.0f);
        }
        return true;
    }

    const float * bias(uint32_t) override { return biased_ ? BIAS : nullptr; }

    const float * selection_bias(uint32_t) override { return nullptr; }

  private:
    const uint32_t k_;
    const bool     biased_;
};

// A model that decodes, its input drifting from layer to layer.
class decoding {
  public:
    decoding(precision_rule rule, std::vector<float> sensitivity, bool biased = false) :
        routers_(files_.index().n_expert_used, biased), k_(files_.index().n_expert_used) {
        hobbit_params p   = tiny_params();
        p.precision_rule  = (int32_t) rule;
        p.eviction_rule   = HOBBIT_EVICT_FORESIGHT;
        p.prefetch_depth  = 2;
        p.prefetch_always = 1;
        p.gate_correction = 1;
        p.low_share       = rule == precision_rule::exact ? 0.0f : 0.4f;
        whole_            = hobbit::pool_min(files_.index()) + 8 * files_.index().max_slot[0];
        hobbit::dispatcher_parts parts;
        parts.routers = &routers_;
        engine_       = std::make_unique<dispatcher>(files_.index(), p, whole_, parts);
        if (rule != precision_rule::exact) {
            engine_->set_sensitivity(std::move(sensitivity));
            engine_->set_thresholds({ 0.6f, 1.0f });
        }
    }

    void batch(uint32_t n_tokens) {
        std::vector<float> x((size_t) n_tokens * N_EXPERT);
        std::generate(x.begin(), x.end(), [&] { return noise_(random_); });
        for (uint32_t layer = 0; layer < files_.index().layers().size(); ++layer) {
            route(layer, n_tokens, x);
            work(layer);
            std::for_each(x.begin(), x.end(), [&](float & v) { v += 0.1f * noise_(random_); });
        }
    }

    // What another thread may do at any time.
    void look(uint32_t i) {
        const hobbit_stats s = stats();
        CHECK_EQ(s.total.selections,
                 s.total.hits_high + s.total.hits_low + s.total.loads_high + s.total.loads_low + s.total.skips);
        engine_->store().resize(i % 2 == 0 ? whole_ : whole_ - 4 * files_.index().max_slot[0]);
    }

    hobbit_stats stats() {
        hobbit_stats s = {};
        engine_->stats(s);
        return s;
    }

    hobbit_counts of_layer(uint32_t layer) {
        hobbit_counts c = {};
        engine_->store().layer_counts(layer, c);
        return c;
    }

    uint64_t selections(uint32_t n_tokens) const { return (uint64_t) n_tokens * files_.index().layers().size() * k_; }

  private:
    void route(uint32_t layer, uint32_t n_tokens, const std::vector<float> & x) {
        std::vector<float>   logits(x.size()), weights((size_t) n_tokens * k_), served(weights.size());
        std::vector<int32_t> ids(weights.size());
        for (uint32_t t = 0; t < n_tokens; ++t) {
            float * row = &logits[(size_t) t * N_EXPERT];
            routers_.logits(layer, layer, &x[(size_t) t * N_EXPERT], false, row);
            std::vector<int32_t> order(N_EXPERT);
            std::iota(order.begin(), order.end(), 0);
            std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
            for (uint32_t j = 0; j < k_; ++j) {
                ids[(size_t) t * k_ + j]     = order[j];
                weights[(size_t) t * k_ + j] = std::exp(row[order[j]]);
            }
            for (uint32_t e = 0; e < N_EXPERT && routers_.bias(layer) != nullptr; ++e) {
                row[e] -= routers_.bias(layer)[e];  // what a router says is told without it
            }
        }
        layer_pass::selections sel;
        sel.ids        = ids.data();
        sel.weights    = weights.data();
        sel.ids_stride = sel.weights_stride = sel.k = k_;
        sel.n_tokens                                = n_tokens;
        hobbit::router_rows rows;
        rows.x        = x.data();
        rows.logits   = logits.data();
        rows.n_embd   = N_EXPERT;
        rows.x_stride = rows.logits_stride = N_EXPERT;
        engine_->route(layer, nullptr, sel, ids.data(), rows, served.data());
    }

    // Two compute threads, of which either predicts when it can be spared.
    void work(uint32_t layer) {
        layer_pass & pass = engine_->pass();
        for (uint32_t part = 0; part < files_.n_parts(); ++part) {
            pass.begin_streams(part);
            on_threads(2, [&](int) {
                engine_->predict_pending();
                for (size_t i = 0; i < pass.items().size(); ++i) {
                    const pass_item & item = pass.items()[i];
                    const std::byte * data = nullptr;
                    while ((data = pass.slice(part, i)) == nullptr && !engine_->store().failed()) {
                        if (!engine_->predict_pending()) {
                            std::this_thread::yield();
                        }
                    }
                    CHECK(data != nullptr);
                    files_.check_slice(data, layer, item.expert, item.prec, part);
                    if (pass.at(part, i).finished.fetch_add(1, std::memory_order_acq_rel) + 1 == 2) {
                        pass.item_done(part, i);
                    }
                }
            });
        }
    }

    tiny_store                      files_;
    rotating_routers                routers_;
    const uint32_t                  k_;
    std::mt19937                    random_ { 1 };
    std::normal_distribution<float> noise_;
    uint64_t                        whole_ = 0;
    std::unique_ptr<dispatcher>     engine_;
};

}  // namespace

TEST("tokens and prompts are served right beside predictions, statistics and a pool that changes its size") {
    for (const auto rule : { precision_rule::exact, precision_rule::miss }) {
        decoding          model(rule, { 0.8f, 0.8f, 0.8f });
        std::atomic<bool> done { false };
        constexpr int     N_ROUNDS = 6;
        uint32_t          n_tokens = 0;
        on_threads(2, [&](int i) {
            if (i == 1) {
                for (uint32_t n = 0; !done.load(); ++n) {
                    model.look(n);
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
                }
                return;
            }
            try {
                for (int round = 0; round < N_ROUNDS; ++round) {
                    for (const uint32_t n : { 5u, 1u, 1u, 1u, 1u, 1u, 1u }) {
                        model.batch(n);
                        n_tokens += n;
                    }
                }
            } catch (...) {
                done = true;
                throw;
            }
            done = true;
        });
        const hobbit_stats s = model.stats();
        CHECK_EQ(s.total.selections, model.selections(n_tokens));
        CHECK_EQ(s.n_tokens, n_tokens);
        CHECK(s.total.prefetches > 0);
        CHECK(s.predicted[0] > 0 && s.predicted_right[0] > s.predicted[0] / 2);  // two of eight at random: a quarter
        CHECK(rule == precision_rule::exact ? s.total.hits_low + s.total.loads_low + s.total.skips == 0
                                            : s.total.cost_low > 0.0);
    }
}

TEST("what is read ahead has the precision of the layer that it is for") {
    decoding model(precision_rule::miss, { 1e9f, 0.0f, 1e9f });  // the second is low as a whole, the others are high
    for (int i = 0; i < 40; ++i) {
        model.batch(1);
    }
    CHECK(model.of_layer(1).prefetches > 0);
    for (uint32_t layer = 0; layer < 3; ++layer) {
        const hobbit_counts c = model.of_layer(layer);
        CHECK_EQ(layer == 1 ? c.hits_high + c.loads_high : c.hits_low + c.loads_low, 0u);
    }
}

namespace {

// Remembers which rows it was asked about.
class noting_routers : public rotating_routers {
  public:
    using rotating_routers::rotating_routers;

    bool logits(uint32_t from, uint32_t to, const float * x, bool norm, float * out) override {
        if (from == 0) {
            std::lock_guard<std::mutex> lock(mutex);
            rows.push_back(x[0]);
        }
        return rotating_routers::logits(from, to, x, norm, out);
    }

    std::mutex         mutex;
    std::vector<float> rows;
};

}  // namespace

TEST("of a long prompt rows from all of it are predicted from") {
    tiny_store     files;
    noting_routers routers(files.index().n_expert_used);
    hobbit_params  p  = tiny_params();
    p.prefetch_depth  = 1;
    p.prefetch_always = 1;
    hobbit::dispatcher_parts parts;
    parts.routers = &routers;
    dispatcher           engine(files.index(), p, hobbit::pool_min(files.index()) + 8 * files.index().max_slot[0], parts);
    const uint32_t       n = 192, k = files.index().n_expert_used;
    std::vector<float>   x(n * N_EXPERT), weights(n * k, 1.0f), served(n * k);
    std::vector<int32_t> ids(n * k);
    for (uint32_t t = 0; t < n; ++t) {
        x[t * N_EXPERT] = (float) t;
        for (uint32_t j = 0; j < k; ++j) {
            ids[t * k + j] = (int32_t) j;
        }
    }
    layer_pass::selections sel;
    sel.ids        = ids.data();
    sel.weights    = weights.data();
    sel.ids_stride = sel.weights_stride = sel.k = k;
    sel.n_tokens                                = n;
    hobbit::router_rows rows;
    rows.x        = x.data();
    rows.n_embd   = N_EXPERT;
    rows.x_stride = N_EXPERT;
    engine.route(0, nullptr, sel, ids.data(), rows, served.data());
    const auto n_asked = [&] {
        std::lock_guard<std::mutex> lock(routers.mutex);
        return routers.rows.size();
    };
    while (n_asked() < 64) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    engine.pass().release();
    std::lock_guard<std::mutex> lock(routers.mutex);
    CHECK_EQ(routers.rows.size(), 64u);
    CHECK(routers.rows[1] == 3.0f && routers.rows[63] == 189.0f);
}

TEST("a router's bias is a part of what is predicted, and not of what is learned") {
    decoding model(precision_rule::exact, {}, true);
    for (int i = 0; i < 300; ++i) {
        model.batch(1);
    }
    const hobbit_stats s = model.stats();
    CHECK(s.predicted[0] > 0 && (double) s.predicted_right[0] > 0.85 * (double) s.predicted[0]);
}

TEST_MAIN()
