// One layer's experts for one batch: what is computed, from where, and how far the compute threads have come.
//
// Built by one thread when the router has spoken, then worked through by all compute threads in each of the layer's products (up, gate,
// down). An item is an expert at a precision with the (slot, token) rows routed to it. Items whose weights are there
// are computed first, the others as they arrive. Items without a cache slot are streamed: their slices go through a few
// streaming slots, each released to the next item by the thread that finishes it.
#pragma once

#include "expert-store.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace hobbit {

struct pass_row {
    int32_t slot;   // which of the token's k selections
    int32_t token;  // row of the batch
};

struct pass_item {
    uint16_t            expert    = 0;
    precision           prec      = precision::high;
    const cache_entry * entry     = nullptr;  // NULL: streamed
    uint32_t            first_row = 0;
    uint32_t            n_rows    = 0;
};

class layer_pass {
  public:
    // How the selections of a token are read; strides in elements.
    struct selections {
        const int32_t * ids            = nullptr;
        size_t          ids_stride     = 0;        // between tokens
        const float *   weights        = nullptr;  // NULL: unknown, all high
        size_t          weights_stride = 0;
        uint32_t        k              = 0;
        uint32_t        n_tokens       = 0;
        bool            gains          = false;  // weights scale the experts' inputs, not shares of a sum (Llama 4)
    };

    explicit layer_pass(expert_store & store, const expert_index & index) : store_(store), index_(index) {}

    ~layer_pass() { release(); }

    // Decides, requests, builds. `out_weights` (may be NULL; k per token, contiguous): the router weights to compute with, skipped ones
    // zero. `profile` (may be NULL) learns the scores. Releases what the pass before held. One thread.
    void build(uint32_t layer, const selections & sel, const policy::serving & how, policy::threshold_profile * profile,
               float * out_weights);
    void release();

    uint32_t layer() const { return layer_; }

    // What this pass was built from, so that a product can tell whether it is the right one.
    const void * key = nullptr;
    // Projections multiplied since it was built. A graph that does not say when the router speaks comes back with the same
    // key and other ids: a projection's second product needs another pass.
    uint32_t parts_done = 0;

    const std::vector<pass_item> & items() const { return items_; }

    const std::vector<pass_row> & rows() const { return rows_; }

    const std::vector<pass_row> & skipped() const { return skipped_; }

    // Experts that had to be read, ahead or now.
    uint32_t n_loads() const { return n_loads_; }

    bool uses(precision p) const { return uses_[(int) p]; }

    // ---- work on projection `part`, by all threads ----

    // The next piece of an item to take, and how many are finished.
    struct progress {
        std::atomic<int32_t>       next { 0 };
        std::atomic<int32_t>       finished { 0 };
        std::atomic<stream_slot *> stream { nullptr };
    };

    progress & at(uint32_t part, size_t item) { return progress_[part * items_.size() + item]; }

    // The item's slice, or NULL when it has not arrived.
    const std::byte * slice(uint32_t part, size_t item);
    // Starts streaming of a product; once, before any slice() of it.
    void begin_streams(uint32_t part);
    // All pieces of the item are computed.
    void item_done(uint32_t part, size_t item);

  private:
    static constexpr uint32_t NO_ITEM = UINT32_MAX;

    // Of build(), in this order.
    void assess(const selections & sel, const policy::serving & how, policy::threshold_profile * profile);
    void gather_wants(const selections & sel);
    void lay_out_items();
    void place_rows(const selections & sel, const policy::serving & how, float * out_weights);
    void reset_progress();

    int32_t & want_of(const selections & sel, size_t s);
    void      stream_next(uint32_t part, stream_slot * slot);

    expert_store &       store_;
    const expert_index & index_;
    uint32_t             layer_   = 0;
    uint32_t             n_loads_ = 0;

    std::vector<expert_want> wants_;
    std::vector<pass_item>   items_;
    std::vector<pass_row>    rows_;
    std::vector<pass_row>    skipped_;
    bool                     uses_[N_PRECISION] = { false, false };

    std::unique_ptr<progress[]> progress_;
    size_t                      progress_room_ = 0;

    std::mutex            stream_mutex_;  // guards the queue
    std::vector<uint32_t> stream_queue_;  // items to stream, last first
    bool                  streaming_ = false;

    // Scratch of build(), kept to spare allocations.
    bool                      split_ = false;  // an expert's high and low needs are wants of their own
    std::vector<policy::need> needs_;          // [n_tokens][k]
    std::vector<policy::need> by_expert_;
    std::vector<uint32_t>     popularity_;
    std::vector<float>        scores_;
    std::vector<int32_t>      want_of_;
    std::vector<uint32_t>     item_of_;
};

}  // namespace hobbit
