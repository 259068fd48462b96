// policy/precision.h: HOBBIT's token-level dynamic loading (arXiv 2411.01433, section 3.2, eq. 2), by hand and at random.
#include "policy/precision.h"

#include "policy/top-k.h"
#include "test.h"

#include <algorithm>
#include <cmath>
#include <random>

using namespace hobbit::policy;

namespace {

// One letter a selection, in the order of the weights: h(igh), l(ow), - (skip), . (never).
std::string letters(const std::vector<need> & needs) {
    std::string out;
    for (const need n : needs) {
        out += n == need::high ? 'h' : n == need::low ? 'l' : n == need::skip ? '-' : '.';
    }
    return out;
}

std::string needs_of(const std::vector<float> & weights, thresholds t) {
    std::vector<need> needs(weights.size());
    classify(weights.data(), (uint32_t) weights.size(), t, needs.data(), nullptr);
    return letters(needs);
}

std::string dropped(const std::vector<float> & weights, float fraction) {
    std::vector<need> needs(weights.size());
    classify_drop(weights.data(), (uint32_t) weights.size(), fraction, needs.data());
    return letters(needs);
}

std::string assessed(const std::vector<float> & weights, const serving & how) {
    std::vector<need>  needs(weights.size());
    std::vector<float> scores(weights.size());
    assess(weights.data(), (uint32_t) weights.size(), 0, how, needs.data(), scores.data());
    return letters(needs);
}

std::vector<float> scores_of(const std::vector<float> & weights) {
    std::vector<need>  needs(weights.size());
    std::vector<float> scores(weights.size(), -1.0f);
    classify(weights.data(), (uint32_t) weights.size(), { 0.6f, 0.9f }, needs.data(), scores.data());
    return scores;
}

bool near(const std::vector<float> & a, const std::vector<float> & b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) { return std::fabs(x - y) < 1e-6f; });
}

std::vector<float> random_weights(std::mt19937 & random) {
    std::vector<float>                    out(1 + random() % 8);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (float & w : out) {
        w = random() % 8 == 0 ? 0.25f : uniform(random) * (random() % 2 ? 1.0f : 10.0f);  // some ties
    }
    return out;
}

constexpr copy_state STATES[] = { copy_state::absent, copy_state::in_flight, copy_state::resident };

char letter(action a) {
    switch (a) {
        case action::use_high:
            return 'H';
        case action::use_low:
            return 'L';
        case action::load_high:
            return 'h';
        case action::load_low:
            return 'l';
        case action::skip:
            return '-';
    }
    return '?';
}

// The nine states of the high and the low copy, the low one turning faster: absent, in flight, resident.
std::string row(precision_rule rule, need n) {
    std::string out;
    for (const copy_state high : STATES) {
        for (const copy_state low : STATES) {
            out += letter(resolve(rule, n, high, low));
        }
        out += ' ';
    }
    out.pop_back();
    return out;
}

}  // namespace

TEST("the score of a selection is the weight before it (k = 2)") {
    CHECK(near(scores_of({ 0.7f, 0.3f }), { 0.0f, 0.7f }));
    CHECK_EQ(needs_of({ 0.7f, 0.3f }, { 0.6f, 0.9f }), "hl");    // 0.6 < 0.7 <= 0.9
    CHECK_EQ(needs_of({ 0.55f, 0.45f }, { 0.6f, 0.9f }), "hh");  // 0.55 <= 0.6
    CHECK_EQ(needs_of({ 0.95f, 0.05f }, { 0.6f, 0.9f }), "h-");  // 0.95 > 0.9
}

TEST("the score of a selection is the weight before it (k = 4)") {
    // 0.4 | 0.3 | 0.2 | 0.1 has the scores 0, 0.4, 0.7, 0.9
    CHECK(near(scores_of({ 0.4f, 0.3f, 0.2f, 0.1f }), { 0.0f, 0.4f, 0.7f, 0.9f }));
    CHECK_EQ(needs_of({ 0.4f, 0.3f, 0.2f, 0.1f }, { 0.6f, 0.8f }), "hhl-");
}

TEST("weights need not come sorted: scores keep their order") {
    CHECK(near(scores_of({ 0.1f, 0.4f, 0.2f, 0.3f }), { 0.9f, 0.0f, 0.7f, 0.4f }));
    CHECK_EQ(needs_of({ 0.1f, 0.4f, 0.2f, 0.3f }, { 0.6f, 0.8f }), "-hlh");
    CHECK_EQ(needs_of({ 0.05f, 0.95f }, { 0.6f, 0.9f }), "-h");
}

TEST("of equal weights the first comes first") {
    CHECK(near(scores_of({ 0.25f, 0.25f, 0.25f, 0.25f }), { 0.0f, 0.25f, 0.5f, 0.75f }));
    CHECK(near(scores_of({ 0.2f, 0.4f, 0.4f }), { 0.8f, 0.0f, 0.4f }));
}

TEST("weights of any sum are normalised") {
    CHECK(near(scores_of({ 7.0f, 3.0f }), { 0.0f, 0.7f }));
    CHECK(near(scores_of({ 0.07f, 0.03f }), { 0.0f, 0.7f }));
    CHECK(near(scores_of({ 1.0f, 4.0f, 2.0f, 3.0f }), { 0.9f, 0.0f, 0.7f, 0.4f }));
    CHECK_EQ(needs_of({ 19.0f, 1.0f }, { 0.6f, 0.9f }), "h-");
}

TEST("a threshold belongs to what is below it") {
    CHECK_EQ(needs_of({ 0.5f, 0.5f }, { 0.5f, 0.9f }), "hh");
    CHECK_EQ(needs_of({ 0.75f, 0.25f }, { 0.5f, 0.75f }), "hl");
}

TEST("weights that sum to nothing leave all in high precision") {
    CHECK_EQ(needs_of({ 0.0f, 0.0f, 0.0f }, { 0.6f, 0.9f }), "hhh");
    CHECK(near(scores_of({ 0.0f, 0.0f, 0.0f }), { 0.0f, 0.0f, 0.0f }));
}

TEST("the most important expert is never low and never skipped") {
    std::mt19937 random(1);
    for (int i = 0; i < 2000; ++i) {
        const auto weights = random_weights(random);
        const auto best    = std::max_element(weights.begin(), weights.end()) - weights.begin();
        CHECK_EQ(needs_of(weights, { -1.0f, -1.0f })[(size_t) best], 'h');  // the harshest thresholds there are
    }
    CHECK_EQ(needs_of({ 1.0f }, { -1.0f, -1.0f }), "h");
}

TEST("higher thresholds never lower a need, a smaller weight never has a higher one") {
    std::mt19937                          random(2);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int i = 0; i < 5000; ++i) {
        const auto weights = random_weights(random);
        const auto k       = (uint32_t) weights.size();
        float      t[4]    = { uniform(random), uniform(random), uniform(random), uniform(random) };
        std::sort(t, t + 4);
        std::vector<need> strict(k), generous(k);
        classify(weights.data(), k, { t[0], t[2] }, strict.data(), nullptr);
        classify(weights.data(), k, { t[1], t[3] }, generous.data(), nullptr);
        for (uint32_t a = 0; a < k; ++a) {
            CHECK(generous[a] >= strict[a]);
            for (uint32_t b = 0; b < k; ++b) {
                CHECK(weights[a] <= weights[b] || strict[a] >= strict[b]);
            }
        }
    }
}

//                                              high:  absent | in flight | resident      low: absent, in flight, resident
TEST("the exact rule reads in high precision whatever is needed") {
    for (const need n : { need::skip, need::low, need::high }) {
        CHECK_EQ(row(precision_rule::exact, n), "hhh HHH HHH");
    }
}

TEST("the miss rule replaces or skips only what is not there") {
    CHECK_EQ(row(precision_rule::miss, need::high), "hhh HHH HHH");  // a low copy does not serve a high need
    CHECK_EQ(row(precision_rule::miss, need::low), "lLL HHL HHH");   // a high copy serves a low one, what is there first
    CHECK_EQ(row(precision_rule::miss, need::skip), "--L --L HHH");  // what is on its way is not waited for
}

TEST("the weight rule does not look at the other copy") {
    CHECK_EQ(row(precision_rule::weight, need::high), "hhh HHH HHH");
    CHECK_EQ(row(precision_rule::weight, need::low), "lLL lLL lLL");
    CHECK_EQ(row(precision_rule::weight, need::skip), "--- --- ---");
}

TEST("the drop rule skips only what is not there, and never looks at low copies") {
    CHECK_EQ(row(precision_rule::drop, need::high), "hhh HHH HHH");
    CHECK_EQ(row(precision_rule::drop, need::skip), "--- --- HHH");
}

TEST("what is never wanted is left out by every rule, there or not") {
    for (const auto rule : { precision_rule::exact, precision_rule::miss, precision_rule::weight, precision_rule::drop }) {
        CHECK_EQ(row(rule, need::never), "--- --- ---");
    }
}

TEST("dropping: below F/k of the token's weight, whatever it sums to") {
    CHECK_EQ(dropped({ 0.4f, 0.3f, 0.2f, 0.1f }, 0.5f), "hhh-");  // limit 0.125
    CHECK_EQ(dropped({ 4.0f, 3.0f, 2.0f, 1.0f }, 0.5f), "hhh-");
    CHECK_EQ(dropped({ 0.4f, 0.3f, 0.2f, 0.1f }, 1.0f), "hh--");  // 0.25
    CHECK_EQ(dropped({ 0.1f, 0.2f, 0.3f, 0.4f }, 1.0f), "--hh");
    CHECK_EQ(dropped({ 0.25f, 0.25f, 0.25f, 0.25f }, 1.0f), "hhhh");  // what is at the limit stays
    CHECK_EQ(dropped({ 0.4f, 0.3f, 0.2f, 0.1f }, 0.0f), "hhhh");
    CHECK_EQ(dropped({ 0.0f, 0.0f }, 1.0f), "hh");
}

TEST("dropping keeps the largest, and drops more with a larger F") {
    std::mt19937                          random(4);
    std::uniform_real_distribution<float> uniform(0.0f, 9.0f);
    for (int i = 0; i < 2000; ++i) {
        const auto  weights = random_weights(random);
        const auto  best    = std::max_element(weights.begin(), weights.end()) - weights.begin();
        const float a = uniform(random), b = a + uniform(random);
        const auto  few = dropped(weights, a), more = dropped(weights, b);
        CHECK_EQ(more[(size_t) best], 'h');
        for (size_t j = 0; j < weights.size(); ++j) {
            CHECK(few[j] == 'h' || more[j] == '-');
        }
    }
}

TEST("by cost: a smaller weight in a less sensitive layer goes first, and the largest is never skipped") {
    const auto by_cost = [](const std::vector<float> & weights, thresholds t, float sensitivity,
                            std::vector<float> * s = nullptr) {
        std::vector<need>  needs(weights.size());
        std::vector<float> scores(weights.size());
        classify_by_cost(weights.data(), (uint32_t) weights.size(), t, sensitivity, needs.data(), scores.data());
        if (s != nullptr) {
            *s = scores;
        }
        return letters(needs);
    };
    const std::vector<float> w = { 1.0f, 4.0f, 2.0f, 3.0f };
    std::vector<float>       s;
    CHECK_EQ(by_cost(w, { 0.75f, 0.85f }, 1.0f, &s), "-hlh");
    CHECK(near(s, { 0.9f, 0.6f, 0.8f, 0.7f }));
    CHECK_EQ(by_cost(w, { 0.82f, 0.85f }, 0.5f, &s), "-hll");  // skipped by weight alone
    CHECK(near(s, { 0.95f, 0.8f, 0.9f, 0.85f }));
    CHECK_EQ(by_cost(w, { 1.0f, 0.75f }, 0.5f), "-h-h");  // T1 may be above T2
    CHECK_EQ(by_cost(w, { 0.0f, 0.0f }, 1.0f), "-l--");
    CHECK_EQ(by_cost(w, { 0.0f, 1.0f }, 1.0f), "llll");
    CHECK_EQ(by_cost(w, { 1.0f, 1.0f }, 1.0f), "hhhh");
    CHECK_EQ(by_cost(w, { 0.5f, 1.0f }, 0.0f), "llll");  // how a layer is measured: it is low as a whole,
    CHECK_EQ(by_cost(w, { 0.5f, 1.0f }, 1e9f), "hhhh");  // and the others are high
    CHECK_EQ(by_cost({ 0.0f, 0.0f }, { 0.5f, 0.6f }, 1.0f), "hh");
    CHECK_EQ(by_cost({ 0.3f }, { 0.0f, 1.0f }, 1.0f), "l");  // s = 0
    CHECK_EQ(by_cost({ 0.3f }, { 0.4f, 0.5f }, 0.7f), "h");
    CHECK_EQ(by_cost({ 0.3f }, { 0.4f, 0.5f }, 0.3f), "l");

    serving how;
    how.rule        = precision_rule::miss;
    how.t           = { 0.75f, 0.85f };
    how.sensitivity = std::make_shared<const std::vector<float>>(std::vector<float> { 1.0f, 0.5f });
    for (uint32_t layer = 0; layer < 2; ++layer) {
        std::vector<need>  needs(4);
        std::vector<float> scores(4);
        assess(w.data(), 4, layer, how, needs.data(), scores.data());
        CHECK_EQ(letters(needs), layer == 0 ? "-hlh" : "-lll");
    }
}

TEST("fewer experts a token: the largest keep what the rule says") {
    serving how;
    how.max_experts = 2;
    CHECK_EQ(assessed({ 0.1f, 0.4f, 0.2f, 0.3f }, how), ".h.h");
    CHECK_EQ(assessed({ 0.25f, 0.25f, 0.25f, 0.25f }, how), "hh..");  // ties by position
    CHECK_EQ(assessed({ 0.7f, 0.3f }, how), "hh");
    CHECK(how.by_weight(4) && !how.by_weight(2));
    how.rule        = precision_rule::miss;
    how.t           = { 0.3f, 0.65f };
    how.max_experts = 3;
    CHECK_EQ(assessed({ 0.1f, 0.4f, 0.2f, 0.3f }, how), ".h-l");
    how.rule          = precision_rule::drop;
    how.drop_fraction = 1.0f;
    CHECK_EQ(assessed({ 0.1f, 0.4f, 0.2f, 0.3f }, how), ".h-h");
}

TEST("default thresholds are the paper's for top-2 and in order for all") {
    CHECK_EQ(default_thresholds(2).t1, 0.6f);
    CHECK_EQ(default_thresholds(2).t2, 0.9f);
    for (uint32_t k = 1; k <= 64; ++k) {
        const thresholds t = default_thresholds(k);
        CHECK(0.0f < t.t1 && t.t1 < t.t2 && t.t2 < 1.0f);
    }
    CHECK(default_thresholds(8).t1 > default_thresholds(4).t1);  // wider routing: scores lie closer to 1
}

TEST("a profile that has seen little keeps the thresholds it is given") {
    threshold_profile  profile;
    std::vector<float> scores(4095, 0.5f);
    profile.add(scores.data(), (uint32_t) scores.size());
    CHECK_EQ(profile.at_quantiles({ 0.1f, 0.2f }).t1, 0.1f);
    CHECK_EQ(profile.at_quantiles({ 0.1f, 0.2f }).t2, 0.2f);
    profile.add(scores.data(), 1);  // the 4096th
    CHECK(profile.at_quantiles({ 0.1f, 0.2f }).t1 >= 0.5f);
}

TEST("a profile splits the selections 67 / 30 / 3, to within a bin") {
    constexpr float                       BIN = 1.0f / 256;
    std::mt19937                          random(3);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (const float power : { 0.3f, 1.0f, 3.0f }) {
        threshold_profile  profile;
        std::vector<float> scores(20000);
        for (float & s : scores) {
            s = std::pow(uniform(random), power);
            profile.add(&s, 1);
        }
        const thresholds t        = profile.at_quantiles({ -1.0f, -1.0f });
        const auto       share_to = [&](float limit) {
            return (double) std::count_if(scores.begin(), scores.end(), [=](float s) { return s <= limit; }) /
                   (double) scores.size();
        };
        CHECK(share_to(t.t1) >= 0.67 && share_to(t.t1 - BIN) <= 0.67);
        CHECK(share_to(t.t2) >= 0.97 && share_to(t.t2 - BIN) <= 0.97);
    }
}

TEST("a profile of scores at the ends stays within 0 and 1") {
    threshold_profile  profile;
    std::vector<float> scores;
    for (int i = 0; i < 8192; ++i) {
        scores.push_back(i % 2 ? 1.0f : i % 4 ? NAN : 0.0f);  // a broken model's are no numbers: they count as 0
    }
    profile.add(scores.data(), (uint32_t) scores.size());
    const thresholds t = profile.at_quantiles({ -1.0f, -1.0f });
    CHECK_EQ(t.t1, 1.0f);
    CHECK_EQ(t.t2, 1.0f);
}

TEST("popularity: the least popular are low up to the share, that much included") {
    const uint32_t    counts[] = { 1, 3, 0, 4 };
    std::vector<need> needs(4);
    classify_popularity(counts, 4, 0.5f, needs.data());
    CHECK_EQ(letters(needs), "llhh");
    classify_popularity(counts, 4, 0.4f, needs.data());
    CHECK_EQ(letters(needs), "lhhh");
}

TEST("of hundreds of experts a token all are looked at") {
    constexpr uint32_t K = 700;
    std::vector<float> weights(K);
    for (uint32_t i = 0; i < K; ++i) {
        weights[i] = (float) (i + 1);  // the largest at the end
    }
    std::vector<need> needs(K, need::low);
    classify(weights.data(), K, { 0.0f, 0.0f }, needs.data(), nullptr);
    CHECK(needs[K - 1] == need::high && std::count(needs.begin(), needs.end(), need::skip) == K - 1);
    serving how;
    how.max_experts = 10;
    assess(weights.data(), K, 0, how, needs.data(), nullptr);
    CHECK_EQ(std::count(needs.begin(), needs.end(), need::never), K - 10);
    CHECK_EQ(std::count(needs.end() - 10, needs.end(), need::high), 10);
}

TEST("default thresholds by hand") {
    CHECK(default_thresholds(5).t1 == 0.63f && default_thresholds(5).t2 == 0.87f);
    CHECK(default_thresholds(7).t1 == 0.76f && default_thresholds(8).t1 == 0.80f);
}

TEST("top-k: a selection bias counts for the ranking, not for the weights") {
    router_shape shape;
    shape.n_expert       = 4;
    shape.k              = 2;
    shape.function       = gating::sigmoid;
    float       logits[] = { 2.0f, 1.0f, 0.0f, -1.0f };
    const float bias[]   = { 0.0f, 0.0f, 0.0f, 5.0f };
    prediction  out;
    predict_top_k(shape, logits, bias, out);
    CHECK(out.experts == (std::vector<uint16_t> { 3, 0 }));
    const float a = 1.0f / (1.0f + std::exp(1.0f)), b = 1.0f / (1.0f + std::exp(-2.0f));
    CHECK(near(out.weights, { a / (a + b), b / (a + b) }));
}

TEST("top-k: groups are ranked by their two best scores") {
    router_shape shape;
    shape.n_expert      = 6;
    shape.k             = 2;
    shape.n_group       = 2;
    shape.n_group_used  = 1;
    shape.function      = gating::sigmoid;
    float      logits[] = { 3.0f, -9.0f, -9.0f, 2.0f, 2.0f, -9.0f };
    prediction out;
    predict_top_k(shape, logits, nullptr, out);
    CHECK(out.experts == (std::vector<uint16_t> { 3, 4 }));
}

TEST_MAIN()
