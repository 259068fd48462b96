// engine/gate-correction.h, engine/prediction-odds.h: what a router says beyond what was predicted is learned, and how sure that is.
#include "engine/gate-correction.h"
#include "engine/prediction-odds.h"

#include "test.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

using hobbit::gate_correction;
using hobbit::prediction_odds;

namespace {

// A router of `n` experts whose logits are what is predicted, and what an earlier router's say of them, a shift of each expert and noise.
class world {
  public:
    world(uint32_t n, float noise, uint32_t seed) : n_(n), noise_(noise), random_(seed) { change(); }

    void change() {
        weights_ = normal((size_t) n_ * n_, 1.0f / std::sqrt((float) n_));
        shift_   = normal(n_, 1.0f);
    }

    // The next token.
    void next() {
        from      = normal(n_, 1.0f);
        predicted = normal(n_, 1.0f);
        actual    = normal(n_, noise_);
        for (uint32_t e = 0; e < n_; ++e) {
            actual[e] += predicted[e] + shift_[e];
            for (uint32_t i = 0; i < n_; ++i) {
                actual[e] += weights_[(size_t) e * n_ + i] * from[i];
            }
        }
    }

    std::vector<float> from, predicted, actual;

  private:
    std::vector<float> normal(size_t n, float scale) {
        std::normal_distribution<float> one(0.0f, 1.0f);
        std::vector<float>              out(n);
        for (float & v : out) {
            v = scale * one(random_);
        }
        return out;
    }

    uint32_t           n_;
    float              noise_;
    std::mt19937       random_;
    std::vector<float> weights_, shift_;
};

// Mean square error of the next `n_tokens` predictions, as corrected before each was learned.
double error_of(world & w, gate_correction & c, uint32_t n, uint32_t n_tokens) {
    std::vector<float> f(gate_correction::sample_size(n, n));
    double             sum = 0.0;
    for (uint32_t t = 0; t < n_tokens; ++t) {
        w.next();
        c.sample(w.from.data(), w.predicted.data(), f.data());
        std::vector<float> logits = w.predicted;
        c.correct(f.data(), logits.data());
        for (uint32_t e = 0; e < n; ++e) {
            sum += std::pow(logits[e] - w.actual[e], 2.0) / n / n_tokens;
        }
        c.learn(f.data(), w.actual.data());
    }
    return sum;
}

constexpr uint32_t N = 16;

}  // namespace

TEST("what the earlier router and the experts' shifts say is learned") {
    world           w(N, 0.1f, 1);
    gate_correction c(N, N);
    const double    before = error_of(w, c, N, 8);  // nothing is corrected yet
    CHECK(before > 1.0);
    error_of(w, c, N, 200);
    CHECK(error_of(w, c, N, 100) < 0.02);  // noise has 0.01
    CHECK(std::fabs(c.standard_error() - 0.1f) < 0.03f);
}

TEST("another kind of text is learned after it was another for long") {
    world           w(N, 0.1f, 2);
    gate_correction c(N, N);
    error_of(w, c, N, 2 * gate_correction::MEMORY - 500);
    w.change();
    error_of(w, c, N, 1000);
    CHECK(error_of(w, c, N, 100) < 0.05);
}

TEST("where there is nothing to learn the prediction stays what it was") {
    world              w(N, 1.0f, 3);
    gate_correction    c(N, N);
    std::vector<float> f(gate_correction::sample_size(N, N));
    std::mt19937       random(4);
    double             worse = 0.0, as_is = 0.0;
    for (uint32_t t = 0; t < 2000; ++t) {
        w.next();
        std::shuffle(w.actual.begin(), w.actual.end(), random);  // it has nothing to do with the rest
        const std::vector<float> actual = [&] {
            std::vector<float> out = w.predicted;
            for (uint32_t e = 0; e < N; ++e) {
                out[e] += 0.1f * w.actual[e];
            }
            return out;
        }();
        c.sample(w.from.data(), w.predicted.data(), f.data());
        std::vector<float> logits = w.predicted;
        c.correct(f.data(), logits.data());
        for (uint32_t e = 0; e < N; ++e) {
            worse += std::pow(logits[e] - actual[e], 2.0);
            as_is += std::pow(w.predicted[e] - actual[e], 2.0);
        }
        c.learn(f.data(), actual.data());
    }
    CHECK(worse < 1.1 * as_is);
}

TEST("what is not a number spoils nothing") {
    world              w(N, 0.1f, 5);
    gate_correction    c(N, N);
    std::vector<float> f(gate_correction::sample_size(N, N));
    error_of(w, c, N, 200);
    for (const float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity() }) {
        w.next();
        c.sample(w.from.data(), w.predicted.data(), f.data());
        std::vector<float> actual = w.actual;
        actual[3]                 = bad;
        c.learn(f.data(), actual.data());
        f[2] = bad;
        c.learn(f.data(), w.actual.data());
    }
    CHECK(error_of(w, c, N, 100) < 0.05);
}

TEST("many experts are folded: what is learned stays of a size") {
    CHECK_EQ(gate_correction::n_features(128, 128), 257u);
    CHECK_EQ(gate_correction::sample_size(128, 128), 257u);
    CHECK_EQ(gate_correction::n_features(256, 256), 257u);  // by two
    CHECK_EQ(gate_correction::sample_size(256, 256), 257u + 256u);
    CHECK_EQ(gate_correction::n_features(512, 512), 129u);  // by eight
    CHECK_EQ(gate_correction::n_features(1, 4096), 16u);
    for (const uint32_t n : { 1u, 129u, 200u, 384u, 1000u, 65535u }) {
        CHECK(gate_correction::n_features(n, n) >= 2 && gate_correction::n_features(n, n) <= 257);
        CHECK(gate_correction::bytes(n, n) <= std::max<size_t>(600 << 10, (n + 3) * 3 * sizeof(float)));
    }
}

TEST("of many experts the shifts are learned, of groups what the earlier router says of them") {
    for (const uint32_t n : { 200u, 509u }) {  // groups of two, and of eight with one that is not full
        world           w(n, 0.1f, 6);
        gate_correction c(n, n);
        const double    before = error_of(w, c, n, 8);
        error_of(w, c, n, 4000);  // of which every fourth counts
        CHECK(error_of(w, c, n, 100) < 0.7 * before);
    }
}

TEST("the odds of a clear prediction are better, and follow what happens") {
    prediction_odds odds;
    float           last = 0.0f;
    for (const float margin : { -1.0f, 0.1f, 0.3f, 0.7f, 1.2f, 1.7f, 2.5f, 9.0f }) {
        const uint8_t bin = prediction_odds::bin(margin);
        CHECK(odds.chance(bin) > last);
        last = odds.chance(bin);
    }
    CHECK_EQ(odds.chance(prediction_odds::UNKNOWN), 1.0f);
    const uint8_t clear = prediction_odds::bin(5.0f), other = prediction_odds::bin(1.2f);
    const float   was = odds.chance(other);
    for (int i = 0; i < 5000; ++i) {
        odds.observe(clear, i % 4 == 0);
        odds.observe(prediction_odds::UNKNOWN, false);
    }
    CHECK(std::fabs(odds.chance(clear) - 0.25f) < 0.02f);
    CHECK_EQ(odds.chance(other), was);
    CHECK_EQ(odds.chance(prediction_odds::UNKNOWN), 1.0f);
}

TEST_MAIN()
