// cache/eviction.h: the priorities, worked by hand. The lowest goes.
#include "cache/eviction.h"

#include "hobbit.h"
#include "test.h"

#include <cmath>

using namespace hobbit;

namespace {

// Token 10 of a sequence on a model of 4 layers, layer 1 running, low copies a quarter of the size.
eviction_context now_at(uint32_t token, uint32_t layer) {
    eviction_context now;
    now.token    = token;
    now.layer    = layer;
    now.n_layer  = 4;
    now.low_cost = 0.25f;
    now.weights  = { 0.4f, 0.3f, 0.2f, 0.1f };
    return now;
}

use_record used(uint32_t last_token, uint32_t high_uses, uint32_t low_uses) {
    use_record use;
    use.last_token = last_token;
    use.uses       = high_uses + low_uses;
    use.high_uses  = high_uses;
    use.low_uses   = low_uses;
    return use;
}

bool near(float a, float b) { return std::fabs(a - b) < 1e-5f; }

const use_record UNUSED = {};

}  // namespace

TEST("eq. 3 by hand") {
    const eviction_context now = now_at(10, 1);
    // R = 8, F = 5, H = 3, l_t = 3, two layers ahead:
    //   0.4 * 8/10 + 0.3 * 5/10 + 0.2 * 3/10 + 0.1 * (1 - 2/4) = 0.32 + 0.15 + 0.06 + 0.05
    CHECK(near(priority_hobbit(used(8, 3, 2), 3, now), 0.58f));
    // The same expert in the running layer, no layer ahead: 0.53 + 0.1 * (1 - 0/4)
    CHECK(near(priority_hobbit(used(8, 3, 2), 1, now), 0.63f));
    // ... and in the layer just passed, (0 - 1 + 4) mod 4 = 3 ahead: 0.53 + 0.1 * (1 - 3/4)
    CHECK(near(priority_hobbit(used(8, 3, 2), 0, now), 0.555f));
    // Not used in this sequence: the layer is all that counts.
    CHECK(near(priority_hobbit(UNUSED, 2, now), 0.075f));
}

TEST("each weight of eq. 3 stands for its term") {
    eviction_context now = now_at(10, 1);
    const use_record use = used(8, 3, 2);
    now.weights          = { 1, 0, 0, 0 };
    CHECK(near(priority_hobbit(use, 3, now), 0.8f));
    now.weights = { 0, 1, 0, 0 };
    CHECK(near(priority_hobbit(use, 3, now), 0.5f));
    now.weights = { 0, 0, 1, 0 };
    CHECK(near(priority_hobbit(use, 3, now), 0.3f));
    now.weights = { 0, 0, 0, 1 };
    CHECK(near(priority_hobbit(use, 3, now), 0.5f));
}

TEST("least cost-weighted use by hand") {
    const eviction_context now = now_at(10, 1);
    // H = 3, L = 4: C = 3 + 0.25 * 4 = 4, C/T = 0.4. Layer 3 is two ahead, D = 2.1.
    // Used by token 9, in the pass before: 0.4 + 1/2.1 = 0.4 + 0.476190
    CHECK(near(priority_lcu(used(9, 3, 4), 3, now), 0.876190f));
    // Last used by token 5: only C/T.
    CHECK(near(priority_lcu(used(5, 3, 4), 3, now), 0.4f));
    CHECK(near(priority_lcu(used(8, 3, 4), 3, now), 0.4f));
    // Layer 0 was passed by this token and is three ahead: 0.4 + 1/3.1 = 0.4 + 0.322581
    CHECK(near(priority_lcu(used(10, 3, 4), 0, now), 0.722581f));
    // The running layer, D = 0.1: 0.4 + 10
    CHECK(near(priority_lcu(used(10, 3, 4), 1, now), 10.4f));
    // A use in low precision is worth its bytes: C = 0.25 * 4 = 1.
    CHECK(near(priority_lcu(used(5, 0, 4), 3, now), 0.1f));
    CHECK_EQ(priority_lcu(UNUSED, 1, now), 0.0f);
}

TEST("what this sequence has not used was not used in the last pass, even at its first token") {
    CHECK_EQ(priority_lcu(UNUSED, 2, now_at(1, 1)), 0.0f);
    CHECK(near(priority_hobbit(UNUSED, 2, now_at(1, 1)), 0.1f * (1 - 1.0f / 4)));
}

TEST("layers are counted around the end of the model") {
    const eviction_context now = now_at(10, 3);
    // From layer 3 of 4, layer 0 is the next: D = 1.1.
    CHECK(near(priority_lcu(used(10, 0, 0), 0, now), 1 / 1.1f));
    CHECK(near(priority_hobbit(UNUSED, 0, now), 0.1f * (1 - 1.0f / 4)));
}

TEST("lru and lfu rank by what their names say and by nothing else") {
    const eviction_context now = now_at(10, 1);
    CHECK(priority_lru(used(3, 9, 9), 2, now) < priority_lru(used(4, 0, 1), 2, now));
    CHECK(priority_lru(UNUSED, 1, now) < priority_lru(used(1, 1, 0), 0, now));
    CHECK_EQ(priority_lru(used(4, 1, 0), 0, now), priority_lru(used(4, 5, 7), 3, now));
    CHECK(priority_lfu(used(9, 2, 0), 2, now) < priority_lfu(used(1, 1, 2), 2, now));
    CHECK_EQ(priority_lfu(used(4, 1, 2), 0, now), priority_lfu(used(7, 3, 0), 3, now));
}

TEST("foresight by hand") {
    eviction_context now = now_at(10, 1);
    float            discount[5];
    for (int d = 0; d <= 4; ++d) {
        discount[d] = std::pow(0.65f, (float) d / 4.0f);
    }
    now.discount = discount;
    use_record use;
    use.recent  = 0.5f;
    use.rate    = 0.2f;
    use.seen[0] = 1.0f;
    use.seen[1] = 0.6f;
    // 0.1 / (1 - 0.65 * 0.7) = 0.183486 for recent, 0.15 / (1 - 0.65) - 0.183486 = 0.245085 for rate.
    // Still to come in the running token, two layers ahead: 0.65^(2/4) * (0.091743 + 0.85 * 1.0 + 0.049017)
    CHECK(near(priority_foresight(use, 3, now), 0.798777f));
    // Passed, three layers ahead, so the next token does not count any more: 0.65^(3/4) * (0.091743 + 0.85 * 0.6 + 0.049017)
    CHECK(near(priority_foresight(use, 0, now), 0.471086f));
    // The running layer comes again after all the others: 0.65 * 0.650760
    CHECK(near(priority_foresight(use, 1, now), 0.422994f));
}

TEST("every number of hobbit_eviction_rule has its rule, other numbers have none") {
    CHECK(find_eviction_rule(HOBBIT_EVICT_LRU) == priority_lru);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LFU) == priority_lfu);
    CHECK(find_eviction_rule(HOBBIT_EVICT_HOBBIT) == priority_hobbit);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LCU) == priority_lcu);
    CHECK(find_eviction_rule(-1) == nullptr);
    CHECK(find_eviction_rule(HOBBIT_EVICT_FORESIGHT) == priority_foresight);
    CHECK(find_eviction_rule(5) == nullptr);
}

TEST_MAIN()
