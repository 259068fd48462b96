// One loaded model: index, store, prefetcher, the pass in work, the first error.
//
// Lives as long as the caller or a buffer of the llama model holds a reference (shared_ptr), whichever is longer.
#pragma once

#include "../base/placement.h"
#include "dispatcher.h"
#include "input-statistics.h"
#include "trace-recorder.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace hobbit {

// Upstream's LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS, which ggml/routers.cpp compares.
constexpr uint32_t LLAMA_CPP_EXPERTS = 1024;
constexpr uint32_t LLAMA_CPP_LAYERS  = 512;

// Throws HOBBIT_ERR_INVALID_ARGUMENT for what is out of range.
void check_params(const hobbit_params & params);

class session : public std::enable_shared_from_this<session> {
  public:
    // Throws what expert_index throws, and HOBBIT_ERR_INVALID_ARGUMENT for parameters out of range.
    session(const std::string & path, const std::string & low_path, const hobbit_params & params);
    ~session();

    const expert_index & index() const { return index_; }

    const hobbit_params & params() const { return params_; }

    // Makes the pool and starts the threads. Throws HOBBIT_ERR_BUDGET, _NO_MEMORY, _STATE.
    void start(uint64_t pool_bytes);
    void stop();

    bool running() const { return dispatcher_ != nullptr; }

    // A compute thread can be spared, or has nothing to do but wait: see dispatcher::predict_pending.
    bool predict_pending() { return dispatcher_->predict_pending(); }

    // See expert_store::resize. HOBBIT_ERR_STATE before start().
    void resize(uint64_t pool_bytes);
    void begin_sequence();

    // The router of a layer has spoken: decides, requests, predicts. Compute thread 0 only. `ids`: those of `sel`, overwritten while
    // routing is replayed. `rows`: what the router saw and said, a row per token. Records an error instead of throwing.
    void route(uint32_t layer, const void * key, layer_pass::selections sel, int32_t * ids, const router_rows & rows,
               float * out_weights);

    // The pass in work; valid between route() and the next route(), NULL when not running.
    layer_pass * pass() { return dispatcher_ ? &dispatcher_->pass() : nullptr; }

    expert_store * store() { return dispatcher_ ? &dispatcher_->store() : nullptr; }

    // Something failed: llama_decode is to be aborted.
    bool failed() const;
    void record_failure(std::exception_ptr why);
    bool take_error(std::exception_ptr & out);
    // Fails with HOBBIT_ERR_CANCELLED. Any thread.
    void cancel();

    // The model uses an expert tensor in a way that cannot be offloaded: start() fails, and a running llama_decode.
    void refuse(const std::string & why);

    void stats(hobbit_stats & out);
    void layer_stats(uint32_t layer, hobbit_counts & out);
    void reset_stats();
    void expert_uses(uint32_t layer, std::vector<uint64_t> & uses, std::vector<uint64_t> & loads);

    timeline & times() { return times_; }

    void decode_begin();

    // llama_decode has returned: nothing is in use any more, so that a pool that shrinks while nothing is computed can give all of it.
    void decode_end();

    input_statistics & inputs() { return inputs_; }

    // Of the compute threads.
    placement & places() { return places_; }

    // Throws HOBBIT_ERR_STATE for predictions with prefetch, which has a thread that uses the routers, and what trace_recorder::begin throws.
    void trace(uint32_t depth, uint64_t max_tokens);

    trace_recorder & traces() { return traces_; }

    // From the next batch on, `routing` (copied) in place of what the routers say; NULL: the routers again. Not while a batch is
    // computed. Throws HOBBIT_ERR_INVALID_ARGUMENT when it does not fit the model.
    void set_routing(const hobbit_routing * routing);

    // From the next batch on; t1 < 0: the paper's quantiles of the scores seen. Not while a batch is computed. Throws HOBBIT_ERR_STATE
    // before start, HOBBIT_ERR_INVALID_ARGUMENT for t1 > t2 by eq. 2.
    void set_thresholds(float t1, float t2);

    // How much each of the `n` MoE layers suffers from low precision, NULL: not known. As set_thresholds, and throws
    // HOBBIT_ERR_INVALID_ARGUMENT for another number of layers or a value that is not finite or below 0.
    void set_sensitivity(const float * a, uint64_t n);

    void set_arrival_hook(expert_store::arrival_hook hook) { on_arrival_ = std::move(hook); }

    void set_routers(std::unique_ptr<router_source> routers) { routers_ = std::move(routers); }

    router_source * routers() { return routers_.get(); }

    // Regular expression for llama_model_params.tensor_buft_overrides.
    const std::string & tensor_pattern() const { return pattern_; }

    // Token embeddings are read by rows, from the file. Before the model is loaded.
    bool embeddings_on_disk = false;

    // Of the seam to ggml: a llama_model_tensor_buft_override array, and whether the model's experts have their buffer.
    std::shared_ptr<void> overrides;
    std::atomic<bool>     has_experts { false };

  private:
    const hobbit_params params_;
    expert_index        index_;
    std::string         pattern_;

    timeline                          times_;
    input_statistics                  inputs_;
    trace_recorder                    traces_;
    placement                         places_;
    expert_store::arrival_hook        on_arrival_;
    std::unique_ptr<router_source>    routers_;
    std::unique_ptr<recorded_routing> routing_;
    std::unique_ptr<dispatcher>       dispatcher_;
    bool                              stopped_ = false;

    std::mutex         failure_mutex_;
    std::exception_ptr failure_;
    std::string        refusal_;  // guarded by failure_mutex_, kept for good
    std::atomic<bool>  failed_ { false };
};

}  // namespace hobbit
