// The engine over a trace, without a model: its store, cache, rules and prefetcher, on a simulated disk.
#pragma once

#include "../engine/dispatcher.h"
#include "../engine/pool-plan.h"
#include "bound.h"
#include "sim-disk.h"

#include <memory>
#include <vector>

namespace hobbit {

struct replay_setup {
    hobbit_params params     = {};
    uint64_t      pool_bytes = 0;

    // Each selection is asked for by itself, in the order of the trace, and let go of before the next: the textbook's cache. By default
    // a layer's selections are asked for together, as the engine does it. Exact precision only.
    bool by_selection = false;
    // What is counted of the uses (frequencies, last tokens) goes on from sequence to sequence.
    bool keep_uses = false;

    disk_model disk;
    double     layer_seconds = 0.0;  // a layer, all experts there
    double     expert_share  = 0.6;  // of that, in the expert products
};

struct replay_result {
    hobbit_stats stats   = {};
    double       seconds = 0.0;
    double       stall   = 0.0;  // of these, nothing to compute but reads to wait for
};

// The pool that holds `share` of all experts in high precision, rounded down to whole ones, or `bytes` if these are not 0; never more
// than is useful. Throws HOBBIT_ERR_INVALID_ARGUMENT, _BUDGET.
uint64_t replay_pool(const expert_index & index, const hobbit_params & params, double share, uint64_t bytes);

class replay {
  public:
    // `lens`: tokens of each sequence, all of the trace.
    replay(const expert_index & index, const hobbit_routing & routing, std::vector<uint32_t> lens);

    replay_result run(const replay_setup & setup);

    // Belady's bound for the needs that `params` give to the selections.
    bound_result bound(const hobbit_params & params, uint64_t pool_bytes) const;

  private:
    class runner;

    const expert_index &  index_;
    recorded_routing      routing_;
    std::vector<uint32_t> lens_;
};

}  // namespace hobbit
