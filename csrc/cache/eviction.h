// Which resident expert goes first: pure functions from what is known about an expert to a priority. The lowest goes.
#pragma once

#include <cstdint>

namespace hobbit {

// How an expert was used in the running sequence, whether it was resident or not. Tokens count from 1.
struct use_record {
    uint32_t last_token = 0;  // R_t: token of the last use, 0 = none in this sequence
    uint32_t uses       = 0;  // F_t
    uint32_t high_uses  = 0;  // H_t
    uint32_t low_uses   = 0;  // L_t
    // Across sequences, kept by class foresight when that rule is in use: expected uses, by token.
    float recent  = 0.0f;
    float rate    = 0.0f;
    float seen[2] = { 0.0f, 0.0f };  // discounted by FORESIGHT_GAMMA a token: from the next token on, and from the one after
};

struct eviction_weights {
    float lru, lfu, lhu, fld;
};

struct eviction_context {
    uint32_t         token    = 0;     // T: tokens so far in this sequence
    uint32_t         layer    = 0;     // l_i: layer now running
    uint32_t         n_layer  = 1;     // l_n
    float            low_cost = 0.5f;  // bytes_low / bytes_high
    eviction_weights weights  = { 0.25f, 0.25f, 0.25f, 0.25f };
    const float *    discount = nullptr;  // FORESIGHT_GAMMA^(D / l_n) for D = 0 .. l_n; for priority_foresight
};

// `layer`: of the entry (l_t).
using eviction_rule = float (*)(const use_record & use, uint32_t layer, const eviction_context & now);

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
float priority_foresight(const use_record & use, uint32_t layer, const eviction_context & now);

// By hobbit_eviction_rule; NULL for an unknown number.
eviction_rule find_eviction_rule(int number);

}  // namespace hobbit
