#include "session.h"

#include "../base/error.h"
#include "../policy/mode.h"

#include <algorithm>

#include <cmath>
#include <cstring>

namespace hobbit {

static void check_params(const hobbit_params & p) {
    const auto require = [](bool ok, const char * what) {
        if (!ok) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT, what);
        }
    };
    require(p.precision_rule >= HOBBIT_PRECISION_EXACT && p.precision_rule <= HOBBIT_PRECISION_DROP,
            "unknown precision rule");
    require(find_eviction_rule(p.eviction_rule) != nullptr, "unknown eviction rule");
    require(p.t1 <= p.t2, "t1 must not be above t2");
    require(p.prefetch_depth <= HOBBIT_MAX_LOOKAHEAD, "prefetch_depth is at most 4");
    require(p.io_threads >= 1 && p.io_threads <= 256, "io_threads must be 1 to 256");
    require(p.io_block >= 4096, "io_block must be at least 4096");
    require(p.drop_fraction >= 0.0f && p.drop_fraction <= 65536.0f, "drop_fraction must not be negative");
    require(p.low_share >= 0.0f && p.low_share <= 0.9f, "low_share must be 0 to 0.9");
    const float sum = p.w_lru + p.w_lfu + p.w_lhu + p.w_fld;
    require(std::fabs(sum - 1.0f) < 1e-3f, "the weights of eq. 3 (w_lru, w_lfu, w_lhu, w_fld) must sum to 1");
}

static expert_index make_index(const std::string & path, const std::string & low_path, const hobbit_params & params) {
    check_params(params);
    return expert_index(path, low_path, params.direct_io != 0);
}

session::session(const std::string & path, const std::string & low_path, const hobbit_params & params) :
    params_(params), index_(make_index(path, low_path, params)), pattern_(index_.tensor_pattern()) {
    how_.rule          = (policy::precision_rule) params.precision_rule;
    how_.drop_fraction = params.drop_fraction;
    how_.max_experts   = params.max_experts;
    how_.t             = policy::default_thresholds(index_.n_expert_used);
    if (params.t1 >= 0.0f) {
        how_.t = { params.t1, params.t2 };
    }
    if (!index_.has_low && how_.rule != policy::precision_rule::drop) {
        how_.rule = policy::precision_rule::exact;  // nothing to serve instead: such a file is run as it is
    }
}

session::~session() { stop(); }

void session::start(uint64_t pool_bytes) {
    if (store_) {
        fail(HOBBIT_ERR_STATE, "the session is started already");
    }
    store_ = std::make_unique<expert_store>(index_, params_, std::min(pool_bytes, pool_max(index_, params_)), on_arrival_);
    store_->set_timeline(&times_);
    pass_ = std::make_unique<layer_pass>(*store_, index_);
    index_.drop_page_cache();  // llama.cpp has read the header and small tensors since
    if (params_.prefetch_depth > 0 && routers_) {
        prefetcher_ = std::make_unique<prefetcher>(*store_, index_, params_, *routers_);
    }
}

void session::stop() {
    prefetcher_.reset();
    pass_.reset();
    store_.reset();
}

void session::begin_sequence() {
    if (store_) {
        store_->begin_sequence();
    }
}

void session::route(uint32_t layer, const void * key, const layer_pass::selections & sel, const float * x, size_t n_embd,
                    size_t x_stride, float * out_weights) {
    try {
        if (!running()) {
            fail(HOBBIT_ERR_STATE, "the model was used before its expert pool was made or after it was closed");
        }
        // Thresholds that are not given follow the model's own distribution of scores, as long as the cache may have a say at
        // all: the weight rule promises the same text for the same prompt.
        const bool adaptive = params_.t1 < 0.0f && how_.rule == policy::precision_rule::miss;
        if (adaptive && layer == 0) {
            how_.t = profile_.at_quantiles(how_.t);
        }
        const auto begin = timeline::clock::now();
        if (layer == 0) {
            times_.batch(sel.n_tokens);
        }
        if (prefetcher_ && sel.n_tokens == 1) {
            prefetcher_->observe(layer, sel.ids, sel.k);
        }
        pass_->build(layer, sel, how_, params_.renormalize != 0, layer == 0, adaptive ? &profile_ : nullptr, out_weights);
        pass_->key = key;
        if (tracing_.load(std::memory_order_relaxed)) {
            record_trace(layer, sel);
        }
        if (times_.on()) {
            times_.add(HOBBIT_EVENT_ROUTE, index_.layers()[layer].block, begin, timeline::clock::now());
        }
        // A whole token without a miss: nothing to read ahead, so predicting would only take time from the compute threads.
        n_quiet_ = pass_->n_loads() > 0 ? 0 : n_quiet_ + 1;
        if (prefetcher_ && x != nullptr && layer + 1 < index_.layers().size() && n_quiet_ < index_.layers().size()) {
            // A sample of a large batch tells its popular experts well enough.
            const uint32_t n_rows = std::min(sel.n_tokens, 64u);
            const size_t   step   = sel.n_tokens / n_rows * x_stride;
            prefetcher_->post(layer, x, n_embd, step, n_rows, how_);
        }
    } catch (...) {
        record_failure(std::current_exception());
    }
}

bool session::failed() const { return failed_.load(std::memory_order_acquire) || (store_ && store_->failed()); }

void session::record_failure(std::exception_ptr why) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) {
        failure_ = why;
    }
    failed_.store(true, std::memory_order_release);
    if (store_) {
        store_->notify();
    }
}

void session::cancel() {
    record_failure(std::make_exception_ptr(error(HOBBIT_ERR_CANCELLED, 0, "the evaluation was cancelled")));
}

bool session::take_error(std::exception_ptr & out) {
    bool found = false;
    {
        std::lock_guard<std::mutex> lock(failure_mutex_);
        if (failure_) {
            out      = failure_;
            failure_ = nullptr;
            found    = true;
        }
        failed_.store(false, std::memory_order_release);
    }
    if (store_) {
        // Reads for the aborted pass may still be running into slots that the next one uses.
        store_->io().drain();

        std::exception_ptr from_store;
        if (store_->take_error(from_store)) {
            out   = found ? out : from_store;
            found = true;
        }
        pass_->release();
    }
    return found;
}

void session::stats(hobbit_stats & out) {
    if (store_) {
        store_->stats(out);
    }
    if (prefetcher_) {
        prefetcher_->recall(out.predicted, out.predicted_right, false);
    }
}

void session::layer_stats(uint32_t layer, hobbit_counts & out) {
    if (store_) {
        store_->layer_counts(layer, out);
    }
}

void session::expert_uses(uint32_t layer, std::vector<uint64_t> & uses, std::vector<uint64_t> & loads) {
    if (store_) {
        store_->expert_uses(layer, uses, loads);
    }
}

void session::reset_stats() {
    if (store_) {
        store_->reset_stats();
    }
    if (prefetcher_) {
        uint64_t unused[2][HOBBIT_MAX_LOOKAHEAD];
        prefetcher_->recall(unused[0], unused[1], true);
    }
}

void session::trace(bool on) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    tracing_.store(on, std::memory_order_relaxed);
    trace_rows_ = 0;
    trace_ids_.clear();
    trace_weights_.clear();
}

void session::record_trace(uint32_t layer, const layer_pass::selections & sel) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    const size_t                n_layer = index_.layers().size();
    const size_t                k       = index_.n_expert_used;
    if (layer == 0) {
        trace_rows_ += sel.n_tokens;
        trace_ids_.resize(trace_rows_ * n_layer * k);
        trace_weights_.resize(trace_rows_ * n_layer * k);
    }
    if (trace_rows_ < sel.n_tokens) {
        return;  // switched on in the middle of a pass
    }
    for (uint32_t i = 0; i < sel.n_tokens; ++i) {
        const size_t at = ((trace_rows_ - sel.n_tokens + i) * n_layer + layer) * k;
        for (size_t j = 0; j < std::min<size_t>(k, sel.k); ++j) {
            trace_ids_[at + j]     = (uint16_t) sel.ids[i * sel.ids_stride + j];
            trace_weights_[at + j] = sel.weights == nullptr ? 0.0f : sel.weights[i * sel.weights_stride + j];
        }
    }
}

uint64_t session::trace_read(uint64_t max_rows, uint16_t * ids, float * weights) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    const size_t                row = index_.layers().size() * index_.n_expert_used;
    const size_t                n   = (size_t) std::min(max_rows, trace_rows_) * row;
    if (n > 0 && ids != nullptr && weights != nullptr) {
        std::copy_n(trace_ids_.begin(), n, ids);
        std::copy_n(trace_weights_.begin(), n, weights);
    }
    return trace_rows_;
}

}  // namespace hobbit
