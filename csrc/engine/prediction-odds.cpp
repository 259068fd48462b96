#include "prediction-odds.h"

#include <algorithm>

namespace hobbit {

// Upper ends of the bins but the last, and what to believe of each before anything was counted (SmolLM2-based 64 experts, top-4, of what
// an LRU cache of 35 % does not hold).
static constexpr std::array<float, 7> ENDS   = { 0.0f, 0.25f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f };
static constexpr std::array<float, 8> BELIEF = { 0.1f, 0.44f, 0.55f, 0.7f, 0.84f, 0.91f, 0.96f, 0.99f };

static constexpr float WEIGHT = 32.0f;    // of the belief, in predictions
static constexpr float MEMORY = 1024.0f;  // predictions; older ones fade

prediction_odds::prediction_odds() {
    for (uint32_t i = 0; i < N_BIN; ++i) {
        all_[i]   = WEIGHT;
        right_[i] = BELIEF[i] * WEIGHT;
    }
}

uint8_t prediction_odds::bin(float margin) {
    return (uint8_t) (std::upper_bound(ENDS.begin(), ENDS.end(), margin) - ENDS.begin());
}

void prediction_odds::observe(uint8_t bin, bool chosen) {
    if (bin == UNKNOWN) {
        return;
    }
    all_[bin] += 1.0f;
    right_[bin] += chosen ? 1.0f : 0.0f;
    if (all_[bin] > MEMORY) {
        all_[bin] /= 2.0f;
        right_[bin] /= 2.0f;
    }
}

}  // namespace hobbit
