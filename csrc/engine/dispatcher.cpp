#include "dispatcher.h"

#include "../base/error.h"

#include <algorithm>
#include <cmath>
#include <system_error>

namespace hobbit {

policy::serving serving_of(const expert_index & index, const hobbit_params & params) {
    policy::serving how;
    how.rule          = (policy::precision_rule) params.precision_rule;
    how.drop_fraction = params.drop_fraction;
    how.max_experts   = params.max_experts;
    how.prefill_low   = params.prefill_low;
    how.renormalize   = params.renormalize != 0;
    how.t             = policy::default_thresholds(index.n_expert_used);
    if (params.t1 >= 0.0f) {
        how.t = { params.t1, params.t2 };
    }
    if (!index.has_low && how.rule != policy::precision_rule::drop) {
        how.rule = policy::precision_rule::exact;  // nothing to serve instead: such a file is run as it is
    }
    return how;
}

dispatcher::dispatcher(const expert_index & index, const hobbit_params & params, uint64_t pool_bytes,
                       const dispatcher_parts & parts) :
    index_(index),
    params_(params),
    routers_(parts.routers),
    threads_(parts.threads),
    times_(parts.times),
    store_(index, params, pool_bytes, parts.on_arrival, parts.make_reader),
    pass_(store_, index),
    how_(serving_of(index, params)),
    thresholds_given_(params.t1 >= 0.0f) {
    store_.set_timeline(times_);
    make_prefetcher();
}

void dispatcher::make_prefetcher() {
    prefetcher_.reset();
    router_source * routers = routing_ != nullptr ? routing_ : routers_;
    if (params_.prefetch_depth == 0 || routers == nullptr) {
        return;
    }
    try {
        prefetcher_ = std::make_unique<prefetcher>(store_, index_, params_, *routers, threads_, routing_ == nullptr);
    } catch (const std::system_error & e) {
        fail_os(HOBBIT_ERR_NO_MEMORY, e.code().value(), "cannot start the prefetch thread");
    }
}

void dispatcher::set_routing(recorded_routing * routing) {
    std::lock_guard<std::mutex> lock(statistics_mutex_);
    prefetcher_.reset();  // its thread may be looking at what is replaced
    routing_ = routing;
    try {
        make_prefetcher();
    } catch (...) {
        routing_ = nullptr;  // the caller will not keep it
        throw;
    }
}

void dispatcher::set_thresholds(policy::thresholds t) {
    if (!(how_.sensitivity ? std::isfinite(t.t1) && std::isfinite(t.t2) : t.t1 <= t.t2)) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, how_.sensitivity ? "t1 and t2 must be numbers" : "t1 must not be above t2");
    }
    thresholds_given_ = t.t1 >= 0.0f;
    how_.t            = thresholds_given_ ? t : policy::default_thresholds(index_.n_expert_used);
}

void dispatcher::set_sensitivity(std::vector<float> a) {
    how_.sensitivity = a.empty() ? nullptr : std::make_shared<const std::vector<float>>(std::move(a));
}

void dispatcher::replace(uint32_t layer, layer_pass::selections & sel, int32_t * ids) {
    if (layer == 0) {
        routing_->begin_pass(sel.n_tokens);
    }
    routed_weights_.resize((size_t) sel.n_tokens * sel.k);
    for (uint32_t i = 0; i < sel.n_tokens; ++i) {
        std::copy_n(routing_->ids(layer, i, sel.n_tokens), sel.k, ids + i * sel.ids_stride);
        std::copy_n(routing_->weights(layer, i, sel.n_tokens), sel.k, &routed_weights_[(size_t) i * sel.k]);
    }
    sel.weights        = routed_weights_.data();
    sel.weights_stride = sel.k;
}

void dispatcher::route(uint32_t layer, const void * key, layer_pass::selections & sel, int32_t * ids,
                       const router_rows & rows, float * out_weights) {
    if (routing_ != nullptr) {
        if (sel.k > index_.n_expert_used) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT, format("layer %u selects %u experts a token and cannot follow a routing of %u",
                                                     layer, sel.k, index_.n_expert_used));
        }
        replace(layer, sel, ids);
    }
    // Thresholds that are not given follow the model's own distribution of scores, as long as the cache may have a say at
    // all: the weight rule promises the same text for the same prompt. By cost T1 and T2 are of two scores (classify_by_cost).
    const bool adaptive = !thresholds_given_ && !how_.sensitivity && how_.rule == policy::precision_rule::miss;
    if (adaptive && layer == 0) {
        how_.t = profile_.at_quantiles(how_.t);
    }
    const auto begin = timeline::clock::now();
    if (times_ != nullptr && layer == 0) {
        times_->batch(sel.n_tokens);
    }
    if (prefetcher_ && sel.n_tokens == 1) {
        prefetcher_->observe(layer, sel.ids, sel.k);
    }
    pass_.build(layer, sel, how_, adaptive ? &profile_ : nullptr, out_weights);
    pass_.key = key;
    if (times_ != nullptr && times_->on()) {
        times_->add(HOBBIT_EVENT_ROUTE, index_.layers()[layer].block, begin, timeline::clock::now());
    }

    if (!prefetcher_ || !prefetcher_->worth_predicting(layer, sel.n_tokens, pass_.n_loads())) {
        return;
    }
    // A sample of a large batch tells its popular experts well enough.
    const uint32_t n_rows = std::min(sel.n_tokens, 64u);
    router_rows    sample = rows;
    if (routing_ != nullptr) {
        sample          = {};
        sample.x        = routing_->input(layer, sel.n_tokens);
        sample.n_embd   = routing_->input_size();
        sample.x_stride = sample.n_embd;
    }
    if (sample.x != nullptr && n_rows > 0) {
        sample.x_stride *= sel.n_tokens / n_rows;
        sample.logits_stride *= sel.n_tokens / n_rows;
        sample.of_tokens = sel.n_tokens;
        prefetcher_->post(layer, sample, n_rows, how_);
    }
}

void dispatcher::stats(hobbit_stats & out) {
    store_.stats(out);
    std::lock_guard<std::mutex> lock(statistics_mutex_);
    if (prefetcher_) {
        prefetcher_->recall(out.predicted, out.predicted_right, false);
        out.prefetch_on    = prefetcher_->on();
        out.prefetch_ratio = prefetcher_->ratio();
    }
}

void dispatcher::reset_stats() {
    store_.reset_stats();
    std::lock_guard<std::mutex> lock(statistics_mutex_);
    if (prefetcher_) {
        uint64_t unused[2][HOBBIT_MAX_LOOKAHEAD];
        prefetcher_->recall(unused[0], unused[1], true);
    }
}

}  // namespace hobbit
