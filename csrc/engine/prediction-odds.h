// How likely it is that a predicted expert will be chosen, by how clearly it was: counted while the model runs.
//
// The margin of an expert is its predicted logit less that of the best one that is not expected to be chosen, in standard errors of the
// prediction. Were the errors normal, and nothing but logits ranked the experts (a bias may, or groups), that would say it all; how often
// it was right is counted instead.
#pragma once

#include <array>
#include <cstdint>

namespace hobbit {

class prediction_odds {
  public:
    static constexpr uint8_t UNKNOWN = 255;  // nothing is known of the errors yet

    prediction_odds();

    static uint8_t bin(float margin);

    // 0 to 1; 1 for UNKNOWN.
    float chance(uint8_t bin) const { return bin == UNKNOWN ? 1.0f : right_[bin] / all_[bin]; }

    void observe(uint8_t bin, bool chosen);

  private:
    static constexpr uint32_t N_BIN = 8;

    std::array<float, N_BIN> right_, all_;
};

}  // namespace hobbit
