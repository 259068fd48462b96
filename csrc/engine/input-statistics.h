// What importance matrices are made of: for each expert of each projection the sum of squares of its inputs by column, and the number of
// inputs, as llama.cpp's llama-imatrix counts them. And the inputs themselves of a batch, of which quantisers learn how columns go together.
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
        bool                  shared = false;  // all experts of a token saw the same, so the layer's rows are these inputs
    };

    bool on() const { return !entries_.empty(); }

    // Begins anew, with sums of zero, or ends and forgets. `rows`: the inputs of a batch are kept too. Not while a batch is computed.
    // Throws std::bad_alloc.
    void enable(const expert_index & index, bool on, bool rows);

    // A new batch: forgets the inputs of the one before.
    void begin();

    // src1 of a MUL_MAT_ID: `n_slots` rows for each token, 1 where a token's k experts all see the same; strides in bytes.
    struct inputs {
        const void * data;
        int64_t      n_slots, n_tokens;
        size_t       slot_stride, token_stride;
        uint32_t     k;
        bool         of_layer;  // not of what each expert has computed, though with k = 1 that looks the same
    };

    // The rows of a product: what is skipped is not counted. One thread. Throws std::bad_alloc.
    void add(uint32_t layer, uint32_t part, const layer_pass & pass, const inputs & x);

    // NULL while it is off.
    const entry * find(uint32_t layer, uint32_t part) const { return on() ? &entries_[layer][part] : nullptr; }

    // The inputs of the tokens of a batch, in its order, and which expert each of a token's k selections is.
    struct batch {
        int32_t               part = -1;  // the first projection to come, which fills this; -1: none has
        uint32_t              k    = 0;
        std::vector<uint16_t> rows;      // F16, [token][n_in]
        std::vector<uint16_t> selected;  // [token][k]
    };

    // NULL where nothing is kept or experts see inputs of their own.
    const batch * find_batch(uint32_t layer, uint32_t part) const;

  private:
    void keep(uint32_t layer, const layer_pass & pass, size_t n_in, const inputs & x);

    std::vector<std::vector<entry>> entries_;  // by layer and projection
    std::vector<batch>              batches_;  // by layer; empty: not kept
};

}  // namespace hobbit
