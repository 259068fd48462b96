// What importance matrices are made of: for each expert of each projection the sum of squares of its inputs by column, and the number of
// inputs, as llama.cpp's llama-imatrix counts them.
#pragma once

#include "layer-pass.h"

#include <vector>

namespace hobbit {

class input_statistics {
  public:
    // Of one projection of a layer. Sums are [n_expert][n_in].
    struct entry {
        std::vector<float>    sums;
        std::vector<uint64_t> counts;
    };

    bool on() const { return !entries_.empty(); }

    // Begins anew, with sums of zero, or ends and forgets. Not while a batch is computed. Throws std::bad_alloc.
    void enable(const expert_index & index, bool on);

    // The rows of a product: what is skipped is not counted. `x`: src1 of the MUL_MAT_ID, whose rows are `slot_stride` and `token_stride` bytes
    // apart; `n_slots` of it, 1 where a token's experts all see the same. One thread.
    void add(uint32_t layer, uint32_t part, const layer_pass & pass, const void * x, int64_t n_slots, size_t slot_stride,
             size_t token_stride);

    // NULL while it is off.
    const entry * find(uint32_t layer, uint32_t part) const { return on() ? &entries_[layer][part] : nullptr; }

  private:
    std::vector<std::vector<entry>> entries_;  // by layer and projection
};

}  // namespace hobbit
