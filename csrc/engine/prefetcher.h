// HOBBIT's layer-level adaptive prefetch (arXiv 2411.01433, section 3.3).
//
// The router input of layer l is put through the routers of layers l+1 .. l+p. Going outwards, the predicted experts that are
// cached are protected from eviction until their layer has passed, and the missing ones are queued: in the paper at the first layer
// where any is missing. With correction, which says how sure a prediction is, at every layer, and this is done for those alone that are
// likely enough to be chosen.
//
// The router input of a single token waits in a mailbox until the layer's first product begins, and one compute thread takes it while the
// others multiply: a thread of its own would take a processor from the products for each prediction (57 instead of 62 ms a token on two
// cores). That of a batch, which takes longer, goes to the prefetch thread.
#pragma once

#include "expert-store.h"
#include "gate-correction.h"
#include "prediction-odds.h"
#include "prefetch-trial.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hobbit {

// What the router of a layer was given and what it said, for rows of a batch. Strides in floats.
struct router_rows {
    const float * x             = nullptr;  // input, rows of n_embd; NULL: not known
    size_t        n_embd        = 0;
    size_t        x_stride      = 0;
    const float * logits        = nullptr;  // rows of n_expert, before a bias is added; NULL: not known
    size_t        logits_stride = 0;
    uint32_t      of_tokens     = 0;  // tokens of the batch, of which the rows may be a sample
};

// The model's routers, as far as they are known. Implemented at the seam to ggml.
class router_source {
  public:
    virtual ~router_source() = default;
    // False when the router of `layer` is not known (yet).
    virtual bool shape(uint32_t layer, policy::router_shape & out) = 0;
    // Router logits [n_expert] of layer `to` on `x` [n_embd], the router input of layer `from`. With `norm_correction`, x is
    // rescaled by w_norm[to] / w_norm[from], the gains of the norms before the routers. False when it cannot be told.
    virtual bool logits(uint32_t from, uint32_t to, const float * x, bool norm_correction, float * out) = 0;
    // NULL, or n_expert values that are added to the logits.
    virtual const float * bias(uint32_t layer) = 0;
    // NULL, or n_expert values that count for the ranking only.
    virtual const float * selection_bias(uint32_t layer) = 0;
};

class prefetcher {
  public:
    // Not `threaded`: post() predicts and queues before it returns. `learns`: the routers have logits, from which corrections are learned.
    prefetcher(expert_store & store, const expert_index & index, const hobbit_params & params, router_source & routers,
               bool threaded = true, bool learns = true);
    ~prefetcher();

    // The pass of `layer` was built and has to read `n_loads` experts: whether its router input is worth predicting from. For every
    // pass, in order, by one thread.
    bool worth_predicting(uint32_t layer, uint32_t n_tokens, uint32_t n_loads);

    // Whether the next token is decoded with prefetch, and what the last trial said of it. Any thread.
    bool on() const { return params_.prefetch_always != 0 || !thread_.joinable() || trial_on_; }

    double ratio() const { return trial_ratio_; }

    // Predicts from what is in the mailbox, if it is a single token's. False when there is nothing to do, or another thread does it. By
    // any compute thread.
    bool run_pending();

    // Leaves what the router of a layer saw and said, `n_tokens` rows. A job not yet begun is replaced: a prediction that comes too late
    // is worth nothing. Called by a compute thread.
    void post(uint32_t layer, const router_rows & rows, uint32_t n_tokens, const policy::serving & how);

    // What the router of `layer` really chose for a single token, for the recall figures.
    void observe(uint32_t layer, const int32_t * ids, uint32_t k);

    // What a prefetcher comes to hold for corrections.
    static uint64_t bytes_learned(const expert_index & index, const hobbit_params & params);

    void recall(uint64_t * predicted, uint64_t * right, bool reset);

  private:
    struct job {
        uint32_t           layer     = 0;
        uint32_t           n_tokens  = 0;
        uint32_t           of_tokens = 0;  // see router_rows
        uint64_t           pass      = 0;  // of all layers and batches
        size_t             n_embd    = 0;
        policy::serving    how;
        std::vector<float> x;
        std::vector<float> logits;  // [n_tokens][n_expert]; empty: not known
    };

    // A prediction that waits for what its router will say.
    struct sample {
        uint64_t           pass      = 0;
        uint32_t           n_tokens  = 0;
        uint32_t           of_tokens = 0;
        std::vector<float> rows;  // [n_tokens][gate_correction::sample_size]
    };

    void run();
    void predict(const job & j);
    void predict_token(const job & j);
    void predict_batch(const job & j);
    bool predict_logits(const job & j, uint32_t d, uint32_t token, float * logits);
    void learn(const job & j);

    expert_store &       store_;
    const expert_index & index_;
    const hobbit_params  params_;
    router_source &      routers_;

    std::mutex              mutex_;  // guards the mailbox
    std::condition_variable posted_;
    job                     mail_;
    std::atomic<bool>       has_mail_ { false };
    job                     now_;         // of run_pending()
    std::mutex              work_mutex_;  // held while predicting: scratch memory is shared
    bool                    stop_ = false;

    // By distance - 1; guarded by work_mutex_. NULL where nothing is learned.
    std::vector<std::unique_ptr<gate_correction>> corrections_[HOBBIT_MAX_LOOKAHEAD];                        // [layer]
    sample                                        samples_[HOBBIT_MAX_LOOKAHEAD][HOBBIT_MAX_LOOKAHEAD + 1];  // [pass]

    prefetch_trial              trial_;
    std::atomic<bool>           trial_on_ { true };  // what it says, for other threads
    std::atomic<double>         trial_ratio_ { 0.0 };
    timeline::clock::time_point token_began_;
    bool                        timing_       = false;  // a single token, from its first layer on
    uint64_t                    bytes_needed_ = 0;      // by the store, when it began
    bool                        learns_       = false;  // there are corrections
    uint64_t                    pass_         = 0;
    size_t                      n_quiet_      = 0;  // layer passes since something had to be read

    // Experts that were predicted, best first, and how clearly each.
    struct guess {
        std::vector<uint16_t> experts;
        std::vector<uint8_t>  bins;  // of prediction_odds
    };

    // By distance - 1.
    std::mutex         recall_mutex_;                // guards what is below, but for the thread
    std::vector<guess> last_[HOBBIT_MAX_LOOKAHEAD];  // [layer]
    prediction_odds    odds_[HOBBIT_MAX_LOOKAHEAD];
    uint64_t           predicted_[HOBBIT_MAX_LOOKAHEAD] = {};
    uint64_t           right_[HOBBIT_MAX_LOOKAHEAD]     = {};

    std::thread thread_;
};

}  // namespace hobbit
