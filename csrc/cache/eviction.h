// Which resident expert goes first. A rule is a row: a pure function from what is known about an expert to a priority (the lowest goes),
// how the slots are shared among the layers, and, for the few rules that keep a state of their own, a ledger.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace hobbit {

// How an expert was used in the running sequence, whether it was resident or not. Tokens count from 1.
struct use_record {
    uint32_t last_token = 0;  // R_t: token of the last use, 0 = none in this sequence
    uint32_t uses       = 0;  // F_t
    uint32_t high_uses  = 0;  // H_t
    uint32_t low_uses   = 0;  // L_t
    // Across sequences: the share of its uses that needed high precision, lately.
    float high_share = 1.0f;
    // Across sequences, kept by class foresight when that rule is in use: the token of the last use, from 1 (0: never); expected uses, by
    // token.
    uint64_t used_at = 0;
    float    recent  = 0.0f;
    float    rate    = 0.0f;
    float seen[2] = { 0.0f, 0.0f };  // discounted by FORESIGHT_GAMMA a token: from the next token on, and from the one after
};

struct eviction_weights {
    float lru, lfu, lhu, fld;
};

struct eviction_context {
    uint32_t         token           = 0;     // T: tokens so far in this sequence, with the batch that is running
    uint32_t         layer           = 0;     // l_i: layer now running
    uint32_t         n_layer         = 1;     // l_n
    float            low_cost        = 0.5f;  // bytes_low / bytes_high
    eviction_weights weights         = { 0.25f, 0.25f, 0.25f, 0.25f };
    const float *    discount        = nullptr;  // FORESIGHT_GAMMA^(D / l_n) for D = 0 .. l_n; for priority_foresight
    float            recency         = 0.0f;     // of priority_foresight: 0: expected uses alone, 1: the order of LRU
    uint64_t         clock           = 0;        // tokens of all sequences, as use_record::used_at
    uint32_t         token_before    = 0;        // T without the batch that is running
    bool             high_serves_low = true;     // policy::high_serves_low(): of two copies the low one is of no use then
};

// How the high-precision slots are shared among the layers. Low-precision copies compete with one another everywhere.
enum class slot_split : uint8_t {
    none,    // all experts compete
    even,    // each layer has the same number
    shallow  // Fate (arXiv 2502.12224): the first four layers are held whole, the rest is split evenly over the deeper ones
};

// Slots of each layer, `n_slots` in all; `experts`: how many a layer has. No layer gets more than its experts, none fewer than k (or its
// experts) as long as there are enough for all: an expert without a slot is read anew for each product. With too few for four
// whole layers, `shallow` fills layers from the first one on.
std::vector<uint32_t> split_slots(slot_split split, const std::vector<uint32_t> & experts, uint32_t k, uint32_t n_slots);

// What a rule remembers beyond use records, of the high-precision copies. Told everything in the order it happens.
class eviction_ledger {
  public:
    virtual ~eviction_ledger() = default;
    // The router selected the expert; `resident`: its copy is there or on its way. Before room is made for it.
    virtual void used(uint32_t layer, uint32_t expert, bool resident) = 0;
    // It got a slot, ahead of its use or for it.
    virtual void inserted(uint32_t layer, uint32_t expert, bool prefetched) = 0;
    virtual void evicted(uint32_t layer, uint32_t expert)                   = 0;
    // The lowest goes, ties by the clock of the cache.
    virtual float priority(uint32_t layer, uint32_t expert) const = 0;
};

struct eviction_rule {
    // `layer`: of the entry (l_t).
    using priority_function = float (*)(const use_record & use, uint32_t layer, const eviction_context & now);
    // `slots`: of each layer.
    using ledger_maker = std::unique_ptr<eviction_ledger> (*)(const std::vector<uint32_t> & slots, uint32_t n_expert);

    priority_function priority;
    slot_split        split       = slot_split::none;
    ledger_maker      make_ledger = nullptr;  // NULL: the priority is all
    bool              by_cost = false;  // the priority counts uses: what each copy saves of their cost is taken into account
};

// Least recently used within the sequence. Ties (one token's pass, or no use in this sequence) go by the cache's own clock, as
// for every rule.
float priority_lru(const use_record & use, uint32_t layer, const eviction_context & now);
float priority_lfu(const use_record & use, uint32_t layer, const eviction_context & now);

// HOBBIT (arXiv 2411.01433) eq. 3:
//   p = w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l_t - l_i + l_n) mod l_n) / l_n)
float priority_hobbit(const use_record & use, uint32_t layer, const eviction_context & now);

// MoE-APEX (ASPLOS'26), least cost-weighted use: C = H + (bytes_low/bytes_high) L, D = (l_t - l_i + l_n) mod l_n + 0.1,
//   p = C/T + 1/D if used in the last token's pass, else C/T
float priority_lcu(const use_record & use, uint32_t layer, const eviction_context & now);

// A use one token later is worth so much of one now.
constexpr float FORESIGHT_GAMMA = 0.65f;
constexpr float FORESIGHT_TOTAL = 1.0f / (1.0f - FORESIGHT_GAMMA);  // worth of one use in every token to come

// Ours: the expected uses to come, discounted by their distance in layers. With D the layers until the expert's next chance and h
// counting the tokens from there,
//   p = gamma^(D/l_n) sum_h gamma^h (a delta^h recent + b seen_h + (1 - a delta^h - b) rate)
// and, as far as `recency` says, in place of the sum over h the chance of what was used n tokens ago, 1/n: the order of LRU within a layer,
// and nearly so between layers.
float priority_foresight(const use_record & use, uint32_t layer, const eviction_context & now);

// ARC (Megiddo and Modha, FAST'03) in each layer: T1 (used once), T2 (used again), the ghosts B1 and B2 of what was evicted from
// them, and the target size of T1, which follows the hits on ghosts. What was read ahead waits in T1 for its first use.
std::unique_ptr<eviction_ledger> make_arc(const std::vector<uint32_t> & slots, uint32_t n_expert);

// By hobbit_eviction_rule; NULL for an unknown number.
const eviction_rule * find_eviction_rule(int number);

}  // namespace hobbit
