#include "session.h"

#include "../base/error.h"
#include "../policy/mode.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <system_error>

namespace hobbit {

void check_params(const hobbit_params & p) {
    require(p.precision_rule >= HOBBIT_PRECISION_EXACT && p.precision_rule <= HOBBIT_PRECISION_DEMAND,
            "unknown precision rule");
    require(find_eviction_rule(p.eviction_rule) != nullptr, "unknown eviction rule");
    require(p.t1 <= p.t2, "t1 must not be above t2");
    require(p.prefetch_depth <= HOBBIT_MAX_LOOKAHEAD, "prefetch_depth is at most 4");
    require(p.prefetch_extra <= UINT16_MAX, "prefetch_extra is at most 65535");
    require(p.io_threads >= 1 && p.io_threads <= 256, "io_threads must be 1 to 256");
    require(p.io_block >= 4096, "io_block must be at least 4096");
    require(p.drop_fraction >= 0.0f && p.drop_fraction <= 65536.0f, "drop_fraction must be 0 to 65536");
    require(p.prefill_low >= 0.0f && p.prefill_low <= 1.0f, "prefill_low must be 0 to 1");
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
    if (sysconf(_SC_PAGESIZE) != (long) PAGE) {
        fail(HOBBIT_ERR_UNSUPPORTED, format("this machine has pages of %ld bytes, the expert pool is made of such of %zu",
                                            sysconf(_SC_PAGESIZE), PAGE));
    }
}

session::~session() { stop(); }

void session::start(uint64_t pool_bytes) {
    if (dispatcher_ || stopped_) {  // what it knows of the model's routers lies in that model
        fail(HOBBIT_ERR_STATE,
             stopped_ ? "the session was stopped: another model needs a new one" : "the session is started already");
    }
    {
        std::lock_guard<std::mutex> lock(failure_mutex_);
        if (!refusal_.empty()) {
            fail(HOBBIT_ERR_UNSUPPORTED, refusal_);
        }
    }
    dispatcher_parts parts;
    parts.on_arrival = on_arrival_;
    parts.routers    = routers_.get();
    parts.times      = &times_;
    try {
        dispatcher_ = std::make_unique<dispatcher>(index_, params_, std::min(pool_bytes, pool_max(index_, params_)), parts);
        if (routing_) {
            dispatcher_->set_routing(routing_.get());
        }
    } catch (...) {
        dispatcher_.reset();  // all or nothing
        throw;
    }
    index_.drop_page_cache();  // llama.cpp has read the header and small tensors since
}

void session::stop() {
    stopped_ = stopped_ || dispatcher_ != nullptr;
    dispatcher_.reset();
}

void session::resize(uint64_t pool_bytes) {
    if (!dispatcher_) {
        fail(HOBBIT_ERR_STATE, "there is no expert pool before the session is started");
    }
    store()->resize(pool_bytes);
}

void session::begin_sequence() {
    if (dispatcher_) {
        store()->begin_sequence();
    }
}

void session::set_routing(const hobbit_routing * routing) {
    std::unique_ptr<recorded_routing> now;
    if (routing != nullptr) {
        now = std::make_unique<recorded_routing>(*routing, index_.layer_experts(), index_.n_expert_used);
    }
    if (dispatcher_) {
        dispatcher_->set_routing(now.get());
    }
    routing_ = std::move(now);
}

void session::set_thresholds(float t1, float t2) {
    if (!dispatcher_) {
        fail(HOBBIT_ERR_STATE, "the session is not started");
    }
    dispatcher_->set_thresholds({ t1, t2 });
}

void session::set_sensitivity(const float * a, uint64_t n) {
    if (!dispatcher_) {
        fail(HOBBIT_ERR_STATE, "the session is not started");
    }
    std::vector<float> by_layer;
    if (a != nullptr) {
        if (n != index_.layers().size()) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT, format("the sensitivity of %llu layers, for a model with %zu of experts",
                                                     (unsigned long long) n, index_.layers().size()));
        }
        by_layer.assign(a, a + n);
        if (std::any_of(by_layer.begin(), by_layer.end(), [](float x) { return !(x >= 0.0f && std::isfinite(x)); })) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT, "a sensitivity is below 0 or not finite");
        }
    }
    dispatcher_->set_sensitivity(std::move(by_layer));
}

void session::route(uint32_t layer, const void * key, layer_pass::selections sel, int32_t * ids, const router_rows & rows,
                    float * out_weights) {
    try {
        if (!running()) {
            fail(HOBBIT_ERR_STATE, "the model was used before its expert pool was made or after it was closed");
        }
        dispatcher_->route(layer, key, sel, ids, rows, out_weights);
        if (tracing_.load(std::memory_order_relaxed)) {
            record_trace(layer, sel);
            if (rows.x != nullptr) {
                record_predictions(layer, sel.n_tokens, rows.x, rows.x_stride);
            }
        }
    } catch (...) {
        record_failure(std::current_exception());
        if (dispatcher_) {
            pass()->release();  // it is of another layer, or half built
        }
    }
}

bool session::failed() const {
    return failed_.load(std::memory_order_acquire) || (dispatcher_ && dispatcher_->store().failed());
}

void session::record_failure(std::exception_ptr why) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (!failure_) {
        failure_ = why;
    }
    failed_.store(true, std::memory_order_release);
    if (dispatcher_) {
        store()->notify();
    }
}

void session::cancel() {
    record_failure(std::make_exception_ptr(error(HOBBIT_ERR_CANCELLED, 0, "the evaluation was cancelled")));
}

void session::refuse(const std::string & why) {
    {
        std::lock_guard<std::mutex> lock(failure_mutex_);
        refusal_ = refusal_.empty() ? why : refusal_;
    }
    if (running()) {
        record_failure(std::make_exception_ptr(error(HOBBIT_ERR_UNSUPPORTED, 0, why)));
    }
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
    if (dispatcher_) {
        // Reads for the aborted pass may still be running into slots that the next one uses.
        store()->io().drain();
        std::exception_ptr from_store;
        if (store()->take_error(from_store)) {
            out   = found ? out : from_store;
            found = true;
        }
        pass()->release();
    }
    return found;
}

void session::decode_begin() {
    times_.begin();
    inputs_.begin();
}

void session::decode_end() {
    times_.end();
    if (dispatcher_) {
        pass()->release();
    }
}

void session::stats(hobbit_stats & out) {
    if (dispatcher_) {
        dispatcher_->stats(out);
    }
}

void session::layer_stats(uint32_t layer, hobbit_counts & out) {
    if (dispatcher_) {
        store()->layer_counts(layer, out);
    }
}

void session::expert_uses(uint32_t layer, std::vector<uint64_t> & uses, std::vector<uint64_t> & loads) {
    if (dispatcher_) {
        store()->expert_uses(layer, uses, loads);
    }
}

void session::reset_stats() {
    if (dispatcher_) {
        dispatcher_->reset_stats();
    }
}

void session::trace(bool on) { trace(on, 0); }

void session::trace(bool on, uint32_t depth) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    tracing_.store(on, std::memory_order_relaxed);
    trace_rows_  = 0;
    trace_depth_ = depth;
    trace_ids_.clear();
    trace_weights_.clear();
    trace_predicted_.clear();
    trace_predicted_weights_.clear();
}

void session::trace_predictions(uint32_t depth) {
    if (depth > HOBBIT_MAX_LOOKAHEAD) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, format("predictions reach at most %d layers ahead", HOBBIT_MAX_LOOKAHEAD));
    }
    if (params_.prefetch_depth > 0) {
        fail(HOBBIT_ERR_STATE, "predictions are recorded without prefetch: load the model with prefetch_depth=0");
    }
    trace(true, depth);
}

void session::record_trace(uint32_t layer, const layer_pass::selections & sel) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    const size_t                n_layer = index_.layers().size();
    const size_t                k       = index_.n_expert_used;
    if (layer == 0) {
        const size_t rows    = trace_rows_ + sel.n_tokens;
        const size_t guesses = rows * n_layer * trace_depth_ * n_predicted();
        trace_ids_.resize(rows * n_layer * k);
        trace_weights_.resize(rows * n_layer * k);
        trace_predicted_.resize(guesses);
        trace_predicted_weights_.resize(guesses);
        trace_rows_ = rows;  // when there is memory for all of them
    }
    if (trace_rows_ < sel.n_tokens) {
        return;  // switched on in the middle of a pass
    }
    for (uint32_t i = 0; i < sel.n_tokens; ++i) {
        const size_t at = ((trace_rows_ - sel.n_tokens + i) * n_layer + layer) * k;
        record_row(layer, sel, i, &trace_ids_[at], &trace_weights_[at]);
    }
}

// A trace has k different experts in each row. Where a layer selects fewer, or one of them twice, others stand there with weight 0.
void session::record_row(uint32_t layer, const layer_pass::selections & sel, uint32_t i, uint16_t * ids,
                         float * weights) const {
    const uint32_t k = index_.n_expert_used;
    uint32_t       n = 0;
    for (uint32_t j = 0; j < std::min(k, sel.k); ++j) {
        const auto     id    = (uint16_t) sel.ids[i * sel.ids_stride + j];
        const float    w     = sel.weights == nullptr ? 0.0f : sel.weights[i * sel.weights_stride + j];
        const uint32_t place = (uint32_t) (std::find(ids, ids + n, id) - ids);
        ids[place]           = id;
        weights[place]       = (place < n ? weights[place] : 0.0f) + w;
        n                    = std::max(n, place + 1);
    }
    for (uint32_t e = 0; n < k && e < index_.layers()[layer].n_expert; ++e) {
        if (std::find(ids, ids + n, (uint16_t) e) == ids + n) {
            ids[n]       = (uint16_t) e;
            weights[n++] = 0.0f;
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

// Of the layers after `layer`, by their own routers on its router input.
void session::record_predictions(uint32_t layer, uint32_t n_tokens, const float * x, size_t x_stride) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    if (!routers_ || trace_rows_ < n_tokens) {
        return;
    }
    const size_t         n_layer = index_.layers().size();
    const uint32_t       m       = n_predicted();
    std::vector<float>   logits;
    policy::prediction   guess;
    policy::router_shape shape;
    for (uint32_t d = 0; d < trace_depth_ && layer + d + 1 < n_layer; ++d) {
        const uint32_t to = layer + d + 1;
        if (!routers_->shape(to, shape)) {
            continue;
        }
        shape.k = std::min(m, shape.n_expert);
        logits.resize(shape.n_expert);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            if (!routers_->logits(layer, to, x + i * x_stride, params_.norm_correction != 0, logits.data())) {
                continue;
            }
            policy::predict_top_k(shape, logits.data(), routers_->selection_bias(to), guess);
            const size_t at = (((trace_rows_ - n_tokens + i) * n_layer + to) * trace_depth_ + d) * m;
            std::copy(guess.experts.begin(), guess.experts.end(), trace_predicted_.begin() + (ptrdiff_t) at);
            std::copy(guess.weights.begin(), guess.weights.end(), trace_predicted_weights_.begin() + (ptrdiff_t) at);
        }
    }
}

uint64_t session::trace_read_predictions(uint64_t max_rows, uint16_t * ids, float * weights) {
    std::lock_guard<std::mutex> lock(trace_mutex_);
    const size_t                row = index_.layers().size() * trace_depth_ * n_predicted();
    const size_t                n   = (size_t) std::min(max_rows, trace_rows_) * row;
    if (n > 0 && ids != nullptr && weights != nullptr) {
        std::copy_n(trace_predicted_.begin(), n, ids);
        std::copy_n(trace_predicted_weights_.begin(), n, weights);
    }
    return trace_depth_ == 0 ? 0 : trace_rows_;
}

}  // namespace hobbit
