// cache/eviction.h: the priorities, worked by hand. The lowest goes.
#include "cache/eviction.h"

#include "hobbit.h"
#include "test.h"

#include <algorithm>
#include <cmath>
#include <numeric>

using namespace hobbit;

namespace {

// Token 10 of a sequence on a model of 4 layers, layer 1 running, low copies a quarter of the size.
eviction_context now_at(uint32_t token, uint32_t layer) {
    eviction_context now;
    now.token        = token;
    now.token_before = token - 1;
    now.layer        = layer;
    now.n_layer      = 4;
    now.low_cost     = 0.25f;
    now.weights      = { 0.4f, 0.3f, 0.2f, 0.1f };
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

TEST("of a batch, what the batch before used was used in the last pass") {
    eviction_context now = now_at(10, 1);
    now.token_before     = 6;  // four sequences side by side, or a draft
    CHECK(near(priority_lcu(used(6, 3, 4), 3, now), 0.876190f));
    CHECK(near(priority_lcu(used(5, 3, 4), 3, now), 0.4f));
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
    // Half by the last use, three tokens ago: 0.65 * (0.650760 + 2.857143 / 4) / 2
    use.used_at = 7;
    now.clock   = 10;
    now.recency = 0.5f;
    CHECK(near(priority_foresight(use, 1, now), 0.443640f));
}

TEST("every number of hobbit_eviction_rule has its rule, other numbers have none") {
    CHECK(find_eviction_rule(HOBBIT_EVICT_LRU)->priority == priority_lru);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LFU)->priority == priority_lfu);
    CHECK(find_eviction_rule(HOBBIT_EVICT_HOBBIT)->priority == priority_hobbit);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LCU)->priority == priority_lcu);
    CHECK(find_eviction_rule(-1) == nullptr);
    CHECK(find_eviction_rule(HOBBIT_EVICT_FORESIGHT)->priority == priority_foresight);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LAYER_LRU)->split == slot_split::even);
    CHECK(find_eviction_rule(HOBBIT_EVICT_LAYER_ARC)->make_ledger == make_arc);
    CHECK(find_eviction_rule(HOBBIT_EVICT_FATE)->split == slot_split::shallow);
    CHECK(find_eviction_rule(8) == nullptr);
}

namespace {

uint32_t sum(const std::vector<uint32_t> & slots) { return std::accumulate(slots.begin(), slots.end(), 0u); }

using slots = std::vector<uint32_t>;

}  // namespace

TEST("slots split evenly") {
    CHECK(split_slots(slot_split::even, slots(4, 10), 2, 20) == (slots { 5, 5, 5, 5 }));
    CHECK(split_slots(slot_split::even, slots(4, 10), 2, 23) == (slots { 6, 6, 6, 5 }));
    CHECK(split_slots(slot_split::even, slots(4, 10), 2, 3) == (slots { 1, 1, 1, 0 }));
    CHECK(split_slots(slot_split::even, slots(4, 10), 2, 99) == (slots { 10, 10, 10, 10 }));
}

TEST("the first four layers are held whole, as far as there are slots, and k of each other") {
    CHECK(split_slots(slot_split::shallow, slots(6, 10), 2, 46) == (slots { 10, 10, 10, 10, 3, 3 }));
    CHECK(split_slots(slot_split::shallow, slots(6, 10), 2, 30) == (slots { 10, 10, 4, 2, 2, 2 }));
    CHECK(split_slots(slot_split::shallow, slots(6, 10), 2, 12) == (slots { 2, 2, 2, 2, 2, 2 }));
    CHECK(split_slots(slot_split::shallow, slots(3, 10), 2, 25) == (slots { 10, 10, 5 }));
    CHECK(split_slots(slot_split::shallow, slots(6, 10), 2, 60) == slots(6, 10));
}

TEST("layers of different sizes: none gets more than it has, and the others get what is left") {
    CHECK(split_slots(slot_split::even, { 10, 4, 10 }, 2, 18) == (slots { 7, 4, 7 }));
    CHECK(split_slots(slot_split::even, { 10, 1, 10 }, 2, 5) == (slots { 2, 1, 2 }));
    CHECK(split_slots(slot_split::shallow, { 10, 1, 10, 10, 10 }, 2, 9) == (slots { 2, 1, 2, 2, 2 }));
    CHECK(split_slots(slot_split::even, { 10, 4, 10 }, 2, 99) == (slots { 10, 4, 10 }));
    CHECK(split_slots(slot_split::shallow, { 6, 3, 6, 3, 6, 3 }, 2, 22) == (slots { 6, 3, 6, 3, 2, 2 }));
    CHECK(split_slots(slot_split::none, { 10, 4 }, 2, 8) == (slots { 8, 4 }));
}

TEST("no slot is lost and no layer gets more than its experts") {
    for (const auto split : { slot_split::even, slot_split::shallow }) {
        for (uint32_t n_layer = 1; n_layer < 9; ++n_layer) {
            for (uint32_t n = 0; n <= n_layer * 7 + 3; ++n) {
                const slots got = split_slots(split, slots(n_layer, 7), 3, n);
                CHECK_EQ(sum(got), std::min(n, n_layer * 7));
                CHECK(*std::max_element(got.begin(), got.end()) <= 7);
                CHECK(n < 3 * n_layer || *std::min_element(got.begin(), got.end()) >= 3);
            }
        }
    }
}

TEST("ARC: what was used twice outlives what was used once, and ghosts move the target") {
    const auto arc = make_arc({ 3 }, 10);
    const auto use = [&](uint32_t e, bool resident) {
        arc->used(0, e, resident);
        if (!resident) {
            arc->inserted(0, e, false);
        }
    };
    use(1, false), use(2, false), use(1, true);  // T1 = { 2 }, T2 = { 1 }
    use(3, false);                               // T1 = { 2, 3 }
    CHECK(arc->priority(0, 2) < arc->priority(0, 1) && arc->priority(0, 2) == arc->priority(0, 3));
    arc->used(0, 4, false);
    arc->evicted(0, 2);  // B1 = { 2 }
    arc->inserted(0, 4, false);
    arc->used(0, 2, false);  // a ghost of T1: its target is 1 now, and two are in it
    CHECK(arc->priority(0, 3) < arc->priority(0, 1));
    arc->evicted(0, 3);
    arc->inserted(0, 2, false);  // T1 = { 4 }, T2 = { 1, 2 }: T1 is at its target
    arc->used(0, 5, false);
    CHECK(arc->priority(0, 1) < arc->priority(0, 4));
}

TEST("ARC: what is read ahead has not been used") {
    const auto arc = make_arc({ 4 }, 10);
    arc->inserted(0, 1, true);
    arc->used(0, 1, true);
    arc->inserted(0, 2, true);
    arc->used(0, 2, true);
    arc->used(0, 2, true);
    CHECK(arc->priority(0, 1) < arc->priority(0, 2));
}

TEST_MAIN()
