// Which precision an expert is served in, if at all: HOBBIT's token-level dynamic loading (arXiv 2411.01433, section 3.2) and the rules
// that it is compared with. Pure functions.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace hobbit::policy {

// What a selection asks for, in rising order: of the tokens of a batch that share an expert the highest need counts. `never`: left out
// whatever is cached, and for this token only.
enum class need : uint8_t { never = 0, skip = 1, low = 2, high = 3 };

constexpr int N_NEED = 4;

enum class precision_rule { exact = 0, miss = 1, weight = 2, drop = 3, demand = 4 };

// Whether some needs are served in low precision; and whether a high copy that is there serves these too, so that with one of every expert
// no low copy is ever asked for.
constexpr bool uses_low(precision_rule r) {
    return r == precision_rule::miss || r == precision_rule::weight || r == precision_rule::demand;
}

constexpr bool high_serves_low(precision_rule r) { return r == precision_rule::miss || r == precision_rule::demand; }

// State of one copy of an expert in the cache.
enum class copy_state : uint8_t { absent, in_flight, resident };

enum class action : uint8_t { use_high, use_low, load_high, load_low, skip };

struct thresholds {
    float t1;
    float t2;
};

// Thresholds at the same quantiles as the paper's 0.6 and 0.9 on top-2 routing (67 % high, 30 % low, 3 % skipped over
// all selections), which do not transfer to wider routing. k = 2: the paper. k = 4 and k = 6: the 67 % and 97 % quantiles of s measured
// on routing traces of gpt-oss-20b and DeepSeek-V2-Lite; k >= 8 continues them.
thresholds default_thresholds(uint32_t k);

// The needs of one token's k selections. `weights`: router weights as the model gives them (not sorted, any sum > 0).
// Sorted by weight, largest first, the unimportance score of selection i is the share of the weight before it (eq. 2):
//     s[0] = 0;  s[i] = g_0 + ... + g_{i-1}
// i == 0 or s[i] <= t1: high;  s[i] <= t2: low;  else skip. `scores` (may be NULL) receives s in the order of `weights`.
void classify(const float * weights, uint32_t k, thresholds t, need * needs, float * scores);

// The same by what serving a selection low costs, where that was measured (`hobbit calibrate`). `sensitivity`: a of this layer, in
// proportion to the root of the divergence from exact mode when the layer alone is served low, the largest of all layers 1.
// The error of a low copy is in proportion to the selection's share g of the token's router weight, and a divergence to its square,
// so those that cost least are those of the smallest a g. What skipping costs differs between layers in another way, and less than a
// ranking by it would gain. In place of eq. 2:
//     1 - g > t2 and not the largest: skip;  1 - a g <= t1 and t1 > 0: high;  else low
void classify_by_cost(const float * weights, uint32_t k, thresholds t, float sensitivity, need * needs, float * scores);

// The rule `drop` needs no low copies: a selection with less than `fraction` / k of the token's router weight is skipped when its
// expert is not there. The largest is kept.
void classify_drop(const float * weights, uint32_t k, float fraction, need * needs);

// Fewer experts a token: only the `n` largest of the k selections keep their need, the others get `never`.
void keep_largest(const float * weights, uint32_t k, uint32_t n, need * needs);

// Fate (arXiv 2502.12224): of a batch the least popular experts, up to `share` of its selections, are low, the others high.
// `counts`: selections of each expert in the batch.
void classify_popularity(const uint32_t * counts, uint32_t n_expert, float share, need * needs);

// Fate: at most 25 to 30 % of a prompt's selections are served in low precision.
constexpr float UNPOPULAR_SHARE = 0.25f;

// How the selections of a token are served: what the parameters of a session come to on its file.
struct serving {
    precision_rule rule          = precision_rule::exact;
    thresholds     t             = { 1.0f, 1.0f };  // of `miss` and `weight`
    float          drop_fraction = 0.0f;            // of `drop`
    uint32_t       max_experts   = 0;               // most experts a token; 0: all that were selected
    float          prefill_low   = 0.0f;  // of a batch, the share of the selections whose experts are low, see below
    bool           renormalize   = true;  // router weights that survive a skip are scaled up

    // Of each MoE layer, see classify_by_cost(). NULL: not measured, by eq. 2. Shared with the prefetch thread.
    std::shared_ptr<const std::vector<float>> sensitivity;

    // The least popular experts of a batch in low precision: see classify_popularity().
    bool by_popularity(uint32_t n_tokens) const {
        return n_tokens > 1 && prefill_low > 0.0f && (rule == precision_rule::demand || rule == precision_rule::miss);
    }

    // Whether router weights have a say. If not, all is high.
    bool by_weight(uint32_t k) const { return rule != precision_rule::exact || limits(k); }

    bool limits(uint32_t k) const { return max_experts > 0 && max_experts < k; }
};

// The needs of one token in an MoE layer by all of this (by `demand`: low; what is there in high precision serves it). `scores` as above,
// written by the rules `miss` and `weight`.
void assess(const float * weights, uint32_t k, uint32_t layer, const serving & how, need * needs, float * scores);

// The distribution of unimportance scores on the model at hand, from which thresholds are taken at the paper's quantiles
// (67 % high, 30 % low, 3 % skipped of all selections).
class threshold_profile {
  public:
    void add(const float * scores, uint32_t k);
    // `otherwise` until enough selections were seen.
    thresholds at_quantiles(thresholds otherwise) const;

  private:
    static constexpr uint32_t N_BIN      = 256;
    static constexpr uint64_t MIN_COUNT  = 4096;
    static constexpr double   SHARE_HIGH = 0.67;
    static constexpr double   SHARE_KEPT = 0.97;

    uint64_t bins_[N_BIN] = {};
    uint64_t count_       = 0;
};

// Precision of one expert of a layer pass given what is cached. `miss`: only an expert that is not there may be read low or skipped; a
// high copy serves a low need, a low copy does not serve a high need. A copy that is already on its way counts as there,
// except for a selection that could be skipped. `weight`: the need alone decides. `drop`: low copies play no part.
// `demand`: as `miss`.
action resolve(precision_rule rule, need n, copy_state high, copy_state low);

}  // namespace hobbit::policy
