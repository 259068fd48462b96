#include "prefetcher.h"

#include "../base/thread-name.h"

#include <algorithm>

namespace hobbit {

prefetcher::prefetcher(expert_store & store, const expert_index & index, const hobbit_params & params,
                       router_source & routers, bool threaded) :
    store_(store), index_(index), params_(params), routers_(routers) {
    for (auto & per_layer : last_) {
        per_layer.resize(index.layers().size());
    }
    if (threaded) {
        thread_ = std::thread([this] { run(); });
    }
}

prefetcher::~prefetcher() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    posted_.notify_all();
    if (thread_.joinable()) {
        thread_.join();
    }
}

bool prefetcher::worth_predicting(uint32_t layer, uint32_t n_tokens, uint32_t n_loads) {
    const size_t n_layer = index_.layers().size();
    // A whole token without a miss: nothing to read ahead, so predicting would only take time from the compute threads.
    n_quiet_ = n_loads > 0 ? 0 : n_quiet_ + 1;
    // From the first router of a token to its last: what comes before and after, a chat's user among it, is not ours. Without threads,
    // in a replay, there is no time.
    if (n_tokens == 1 && thread_.joinable()) {
        if (layer == 0) {
            token_began_ = timeline::clock::now();
            token_loads_ = 0;
        }
        token_loads_ += n_loads;
        if (layer + 1 == n_layer) {
            trial_.measured(std::chrono::duration<double>(timeline::clock::now() - token_began_).count(), token_loads_ > 0);
        }
    }
    return layer + 1 < n_layer && n_quiet_ < n_layer && (n_tokens > 1 || on());
}

void prefetcher::post(uint32_t layer, const float * x, size_t n_embd, size_t stride, uint32_t n_tokens,
                      const policy::serving & how) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        mail_.layer    = layer;
        mail_.n_tokens = n_tokens;
        mail_.n_embd   = n_embd;
        mail_.how      = how;
        mail_.x.resize(n_tokens * n_embd);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            std::copy_n(x + i * stride, n_embd, mail_.x.begin() + (ptrdiff_t) (i * n_embd));
        }
        has_mail_ = thread_.joinable();
    }
    if (!thread_.joinable()) {
        predict(mail_);
    } else if (n_tokens > 1) {
        posted_.notify_one();
    }
}

bool prefetcher::run_pending() {
    if (!has_mail_.load(std::memory_order_relaxed)) {
        return false;
    }
    std::unique_lock<std::mutex> work(work_mutex_, std::try_to_lock);
    if (!work.owns_lock()) {
        return false;
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!has_mail_ || mail_.n_tokens != 1) {
            return false;
        }
        std::swap(now_, mail_);
        has_mail_ = false;
    }
    predict(now_);
    return true;
}

void prefetcher::run() {
    name_thread("hobbit-predict");
    job now;
    while (true) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            posted_.wait(lock, [this] { return (has_mail_ && mail_.n_tokens > 1) || stop_; });
            if (stop_) {
                return;
            }
            std::swap(now, mail_);
            has_mail_ = false;
        }
        std::lock_guard<std::mutex> work(work_mutex_);
        predict(now);
    }
}

void prefetcher::predict(const job & j) {
    // One token: few reads, since a demand read must find the disk free. A batch takes long to compute: all of the disk.
    const bool one_token = j.n_tokens == 1;
    store_.io().set_max_prefetch(one_token ? params_.prefetch_reads : params_.io_threads);
    if (one_token) {
        predict_token(j);
    } else {
        predict_batch(j);
    }
}

void prefetcher::predict_token(const job & j) {
    std::vector<float>        logits;
    std::vector<expert_want>  wants;
    std::vector<policy::need> needs;
    policy::prediction        guess;
    bool                      queue = true;
    for (uint32_t d = 1; d <= params_.prefetch_depth && j.layer + d < index_.layers().size(); ++d) {
        const uint32_t       to = j.layer + d;
        policy::router_shape shape;
        if (!routers_.shape(to, shape)) {
            continue;
        }
        logits.resize(shape.n_expert);
        if (!routers_.logits(j.layer, to, j.x.data(), params_.norm_correction != 0, logits.data())) {
            continue;
        }
        const uint32_t n_used = shape.k;
        shape.k               = std::min(shape.k + params_.prefetch_extra, shape.n_expert);
        policy::predict_top_k(shape, logits.data(), routers_.selection_bias(to), guess);
        {
            std::lock_guard<std::mutex> lock(recall_mutex_);
            last_[d - 1][to] = guess.experts;
        }
        if (!queue) {
            continue;  // farther layers are predicted for the recall figures only
        }
        needs.assign(guess.experts.size(), policy::need::high);
        // By `demand` what is read ahead is high, and so is by any rule what is read beyond the k that are expected.
        if (j.how.by_weight(n_used) && j.how.rule != policy::precision_rule::demand) {
            policy::assess(guess.weights.data(), n_used, j.how, needs.data(), nullptr);
        }
        wants.clear();
        for (size_t i = 0; i < guess.experts.size(); ++i) {
            expert_want w;
            w.expert = guess.experts[i];
            w.need   = needs[i];
            wants.push_back(w);
        }
        queue = store_.prefetch(to, d, wants) == 0;
    }
}

void prefetcher::predict_batch(const job & j) {
    // Practically every expert of the next layer is needed by a large batch; a small one is predicted token by token.
    const uint32_t       to = j.layer + 1;
    policy::router_shape shape;
    if (to >= index_.layers().size() || !routers_.shape(to, shape)) {
        return;
    }
    std::vector<uint32_t> votes(shape.n_expert, 0);
    std::vector<float>    logits(shape.n_expert);
    policy::prediction    guess;
    for (uint32_t i = 0; i < j.n_tokens; ++i) {
        if (!routers_.logits(j.layer, to, j.x.data() + i * j.n_embd, params_.norm_correction != 0, logits.data())) {
            return;
        }
        policy::predict_top_k(shape, logits.data(), routers_.selection_bias(to), guess);
        const auto k = (uint32_t) guess.experts.size();
        for (uint32_t s = 0; s < (j.how.limits(k) ? j.how.max_experts : k); ++s) {
            votes[guess.experts[s]]++;
        }
    }
    std::vector<expert_want> wants;
    for (uint32_t e = 0; e < shape.n_expert; ++e) {
        if (votes[e] > 0) {
            expert_want w;
            w.expert = (uint16_t) e;
            w.count  = votes[e];
            wants.push_back(w);
        }
    }
    // Most popular first (Fate).
    std::stable_sort(wants.begin(), wants.end(),
                     [](const expert_want & a, const expert_want & b) { return a.count > b.count; });
    store_.prefetch(to, 1, wants);
}

void prefetcher::observe(uint32_t layer, const int32_t * ids, uint32_t k) {
    std::lock_guard<std::mutex> lock(recall_mutex_);
    for (uint32_t d = 0; d < HOBBIT_MAX_LOOKAHEAD; ++d) {
        auto & guess = last_[d][layer];
        if (guess.empty()) {
            continue;
        }
        predicted_[d] += k;
        for (uint32_t i = 0; i < k; ++i) {
            right_[d] += std::find(guess.begin(), guess.end(), (uint16_t) ids[i]) != guess.end();
        }
        guess.clear();
    }
}

void prefetcher::recall(uint64_t * predicted, uint64_t * right, bool reset) {
    std::lock_guard<std::mutex> lock(recall_mutex_);
    for (uint32_t d = 0; d < HOBBIT_MAX_LOOKAHEAD; ++d) {
        predicted[d] = predicted_[d];
        right[d]     = right_[d];
        if (reset) {
            predicted_[d] = right_[d] = 0;
        }
    }
}

}  // namespace hobbit
