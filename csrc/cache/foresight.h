// What the tokens so far tell about the next uses of each expert: the memory behind the eviction rule `foresight`.
//
// Text repeats itself, and so does its routing: after a token that chose its experts as this one does, the experts of the tokens
// that followed are needed again. So the choices of the last HISTORY tokens are kept, a bit per expert. For the last whole token
// the NEIGHBOURS most like it (most experts in common, over all layers) are looked up, and what followed each of them is added
// up: token h after it weighs gamma^h. Beside that each expert has a recent and a long-run rate of use. All three are expected
// discounted uses, which priority_foresight() adds up.
//
// Measured on 25 k tokens of real routing (DeepSeek-V2-Lite on two kinds of text, gpt-oss-20b), all in one precision, at 12.5, 25
// and 50 % of the experts cached: 41 to 79 % of the gap between LRU and Belady's optimum is closed; by the rates alone 15 to 46 %.
// Knowing the next three layers for sure would add less than one point.
//
// What all three expect of a text may be wrong: it changes its subject, and for a hundred tokens favourites of before outrank what is used
// now, where LRU would not have erred. So the ages of all experts tell what LRU would hold in as much memory, and by how many hits more
// or fewer that has, `recency` follows, with which priorities go over to nearly the order of LRU.
//
// Not thread-safe: the expert store holds its lock around every call.
#pragma once

#include "expert-cache.h"

#include <cstdint>
#include <vector>

namespace hobbit {

class foresight {
  public:
    static constexpr uint32_t HISTORY    = 2048;  // tokens; 1000 cost half a point of hit rate
    static constexpr uint32_t NEIGHBOURS = 16;
    static constexpr uint32_t HORIZON    = 16;  // tokens after a neighbour that count

    // `prior`: share of a layer's experts that a token uses, the rate of an expert that nothing is known of.
    // `low_cost`, `high_serves_low`: as in eviction_context.
    foresight(expert_cache & cache, uint32_t n_layer, uint32_t n_expert, float prior, float low_cost = 0.0f,
              bool high_serves_low = true);

    // What it keeps.
    static uint64_t bytes(uint32_t n_layer, uint32_t n_expert) {
        return (uint64_t) HISTORY * (n_words(n_layer, n_expert) * sizeof(uint64_t) + sizeof(uint32_t));
    }

    // The choices of `n_tokens` at a layer; ids [n_tokens][k], `stride` elements from token to token. Layer 0 begins new tokens.
    void observe(uint32_t layer, const int32_t * ids, size_t stride, uint32_t k, uint32_t n_tokens);

    // Brings use_record::seen up to date with the last token whose layers were all observed. 0.1-0.2 ms, once a token.
    void refresh();

    // See eviction_context.
    float recency() const { return recency_; }

    uint64_t clock() const { return n_tokens_; }

    // The text breaks off here: what was used lately says nothing about what comes.
    void begin_sequence();

  private:
    static uint32_t n_words(uint32_t n_layer, uint32_t n_expert) { return (n_layer * n_expert + 63) / 64; }

    uint64_t * row(uint64_t token) { return bits_.data() + (token % HISTORY) * n_words_; }

    void     judge(const cache_entry * high, const cache_entry * low, const use_record & use);
    void     follow_lru();
    uint32_t overlap(const uint64_t * a, const uint64_t * b) const;
    void     add_followers(uint64_t neighbour, float weight);

    expert_cache & cache_;
    const uint32_t n_layer_;
    const uint32_t n_expert_;
    const float    low_cost_;
    const bool     high_serves_low_;
    const uint32_t n_words_;  // of a token's row of bits: [layer][expert]

    std::vector<uint64_t> bits_;             // ring of HISTORY rows
    uint64_t              n_tokens_   = 0;   // seen at layer 0
    uint64_t              batch_      = 0;   // first token of the running batch
    uint64_t              n_whole_    = 0;   // tokens whose layers were all observed
    uint64_t              fresh_for_  = 0;   // n_whole_ at the last refresh()
    float                 unknown_[2] = {};  // of a neighbour's followers, the share that has not happened yet
    std::vector<uint32_t> ages_;             // experts whose last use was at a token, of the last HISTORY
    // LRU holds what was used up to so many tokens ago, and a part of what was used one before that.
    uint64_t lru_age_  = 0;
    float    lru_part_ = 0.0f;
    // Uses of the running token, weighted by what a read costs: LRU's hits less ours; our misses; all that were judged.
    float ahead_   = 0.0f;
    float misses_  = 0.0f;
    float judged_  = 0.0f;
    float recency_ = 0.0f;
};

}  // namespace hobbit
