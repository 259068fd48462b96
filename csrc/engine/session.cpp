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

// Of what else the metadata may say llama.cpp ends the process.
static void check_metadata(const expert_index & index) {
    if (index.n_expert_said < index.n_expert_used || index.n_expert_said > LLAMA_CPP_EXPERTS) {
        fail(HOBBIT_ERR_FORMAT,
             format("%s: by the metadata a layer has %u experts (expert_count) and a token uses %u of them; "
                    "llama.cpp takes at most %u",
                    index.path().c_str(), index.n_expert_said, index.n_expert_used, LLAMA_CPP_EXPERTS));
    }
    if (index.n_block == 0 || index.n_block > LLAMA_CPP_LAYERS) {
        fail(HOBBIT_ERR_FORMAT, format("%s: by the metadata it has %u layers (block_count); llama.cpp takes 1 to %u",
                                       index.path().c_str(), index.n_block, LLAMA_CPP_LAYERS));
    }
}

session::session(const std::string & path, const std::string & low_path, const hobbit_params & params) :
    params_(params), index_(make_index(path, low_path, params)), pattern_(index_.tensor_pattern()), traces_(index_) {
    check_metadata(index_);
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
        if (traces_.on()) {
            traces_.record(layer, sel, rows, routers_.get(), params_.norm_correction != 0);
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

void session::trace(uint32_t depth, uint64_t max_tokens) {
    if (depth > 0 && params_.prefetch_depth > 0) {
        fail(HOBBIT_ERR_STATE, "predictions are recorded without prefetch: load the model with prefetch_depth=0");
    }
    traces_.begin(depth, max_tokens);
}

}  // namespace hobbit
