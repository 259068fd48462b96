// What happens when a router has spoken: decides, requests, predicts. The same for a model that runs and for a replay.
#pragma once

#include "layer-pass.h"
#include "prefetcher.h"
#include "recorded-routing.h"

#include <memory>
#include <mutex>
#include <vector>

namespace hobbit {

// What a dispatcher stands on.
struct dispatcher_parts {
    expert_store::arrival_hook   on_arrival;         // may be empty
    expert_store::reader_factory make_reader;        // empty: the reader threads
    router_source *              routers = nullptr;  // may be NULL: nothing is predicted
    timeline *                   times   = nullptr;  // may be NULL
    bool                         threads = true;     // false: predictions are made on the caller's thread
};

// What the parameters come to on a file: how the selections of a token are served.
policy::serving serving_of(const expert_index & index, const hobbit_params & params);

class dispatcher {
  public:
    // Throws HOBBIT_ERR_BUDGET, _NO_MEMORY.
    dispatcher(const expert_index & index, const hobbit_params & params, uint64_t pool_bytes,
               const dispatcher_parts & parts);

    // `ids`: those of `sel`, to be overwritten where routing is replayed, which also replaces the weights in `sel`. `key`, `rows` and the rest:
    // see session::route.
    void route(uint32_t layer, const void * key, layer_pass::selections & sel, int32_t * ids, const router_rows & rows,
               float * out_weights);

    // Not while a batch is computed. NULL: the routers' own again. `routing` must outlive its use.
    void set_routing(recorded_routing * routing);

    // Not while a batch is computed. t1 < 0: at the paper's quantiles of the scores seen.
    void set_thresholds(policy::thresholds t);

    // Of each layer; empty: not known.
    void set_sensitivity(std::vector<float> a);

    layer_pass & pass() { return pass_; }

    expert_store & store() { return store_; }

    // By a compute thread that can be spared: predicts what comes, if that is still to be done. True when it did.
    bool predict_pending() { return prefetcher_ && prefetcher_->run_pending(); }

    // Any thread.
    void stats(hobbit_stats & out);
    void reset_stats();

  private:
    void replace(uint32_t layer, layer_pass::selections & sel, int32_t * ids);
    void make_prefetcher();

    const expert_index & index_;
    const hobbit_params  params_;
    router_source *      routers_;
    const bool           threads_;
    timeline *           times_;

    expert_store                store_;
    layer_pass                  pass_;
    std::mutex                  statistics_mutex_;  // for who looks at prefetcher_ while no batch is computed
    std::unique_ptr<prefetcher> prefetcher_;
    recorded_routing *          routing_ = nullptr;
    std::vector<float>          routed_weights_;

    policy::threshold_profile profile_;
    policy::serving           how_;
    bool                      thresholds_given_;
};

}  // namespace hobbit
