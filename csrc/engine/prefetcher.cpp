#include "prefetcher.h"

#include "../base/thread-name.h"

#include <algorithm>
#include <new>

namespace hobbit {

// By distance - 1: chance of being chosen from which on an expert is read ahead. Further away, waiting costs little: the next layer's
// prediction will be a better one.
static constexpr float MIN_CHANCE[HOBBIT_MAX_LOOKAHEAD] = { 0.6f, 0.75f, 0.85f, 0.9f };

// `body(distance, to, n_from, n_to)` for the predictions that are corrected, of layer `to` from the one so far before it; of experts each.
template <typename F>
static void for_each_corrected(const expert_index & index, const hobbit_params & params, F && body) {
    const auto & layers = index.layers();
    for (uint32_t d = 1; params.gate_correction != 0 && d <= params.prefetch_depth; ++d) {
        for (uint32_t to = d; to < layers.size(); ++to) {
            body(d, to, layers[to - d].n_expert, layers[to].n_expert);
        }
    }
}

prefetcher::prefetcher(expert_store & store, const expert_index & index, const hobbit_params & params,
                       router_source & routers, bool threaded, bool learns) :
    store_(store), index_(index), params_(params), routers_(routers) {
    for (auto & per_layer : last_) {
        per_layer.resize(index.layers().size());
    }
    for (auto & per_layer : corrections_) {
        per_layer.resize(index.layers().size());
    }
    // Now, since where they are used nobody could say that there is no memory.
    if (learns) {
        for_each_corrected(index, params, [&](uint32_t d, uint32_t to, uint32_t n_from, uint32_t n_to) {
            corrections_[d - 1][to] = std::make_unique<gate_correction>(n_from, n_to);
            learns_                 = true;
        });
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
    pass_++;
    // A whole token without a miss: nothing to read ahead, so predicting would only take time from the compute threads.
    n_quiet_ = n_loads > 0 ? 0 : n_quiet_ + 1;
    // From the first router of a token to its last: what comes before and after, a chat's user among it, is not ours. Without threads,
    // in a replay, there is no time.
    // Of a prompt llama.cpp computes the last layer for one token only.
    timing_ = n_tokens == 1 && thread_.joinable() && (layer == 0 || timing_);
    if (timing_) {
        if (layer == 0) {
            token_began_  = timeline::clock::now();
            bytes_needed_ = store_.bytes_needed();
        }
        if (layer + 1 == n_layer) {
            // Less than before: the statistics were reset meanwhile.
            const uint64_t bytes = store_.bytes_needed();
            trial_.measured(std::chrono::duration<double>(timeline::clock::now() - token_began_).count(),
                            bytes > bytes_needed_ ? bytes - bytes_needed_ : 0);
            trial_on_    = trial_.on();
            trial_ratio_ = trial_.ratio();
        }
    }
    // From the last layer nothing is predicted; what was predicted of it is learned from.
    return (layer + 1 < n_layer || learns_) && n_quiet_ < n_layer && (n_tokens > 1 || on());
}

void prefetcher::post(uint32_t layer, const router_rows & rows, uint32_t n_tokens, const policy::serving & how) {
    const size_t n_embd   = rows.n_embd;
    const size_t n_expert = index_.layers()[layer].n_expert;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        mail_.layer     = layer;
        mail_.n_tokens  = n_tokens;
        mail_.pass      = pass_;
        mail_.of_tokens = rows.of_tokens;
        mail_.n_embd    = n_embd;
        mail_.how       = how;
        mail_.x.resize(n_tokens * n_embd);
        mail_.logits.resize(rows.logits == nullptr ? 0 : n_tokens * n_expert);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            std::copy_n(rows.x + i * rows.x_stride, n_embd, mail_.x.begin() + (ptrdiff_t) (i * n_embd));
            if (rows.logits != nullptr) {
                std::copy_n(rows.logits + i * rows.logits_stride, n_expert,
                            mail_.logits.begin() + (ptrdiff_t) (i * n_expert));
            }
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
    try {
        if (one_token) {
            predict_token(j);
        } else {
            predict_batch(j);
        }
        learn(j);
    } catch (const std::bad_alloc &) {
        // Nothing is read ahead.
    }
}

// Router logits of the layer `d` after that of the job, for row `token` of it. False when there is nothing to predict from.
bool prefetcher::predict_logits(const job & j, uint32_t d, uint32_t token, float * logits) {
    const uint32_t to = j.layer + d;
    if (!routers_.logits(j.layer, to, j.x.data() + token * j.n_embd, params_.norm_correction != 0, logits)) {
        return false;
    }
    const auto & correction = corrections_[d - 1][to];
    if (j.logits.empty() || !correction) {
        return true;
    }
    const uint32_t n_from = index_.layers()[j.layer].n_expert;
    const size_t   size   = gate_correction::sample_size(n_from, index_.layers()[to].n_expert);
    sample &       s      = samples_[d - 1][(j.pass + d) % (HOBBIT_MAX_LOOKAHEAD + 1)];
    s.pass                = j.pass + d;
    s.n_tokens            = j.n_tokens;
    s.of_tokens           = j.of_tokens;
    s.rows.resize(j.n_tokens * size);
    float * row = s.rows.data() + token * size;
    correction->sample(&j.logits[token * n_from], logits, row);
    correction->correct(row, logits);
    return true;
}

// From what was predicted of this layer.
void prefetcher::learn(const job & j) {
    if (j.logits.empty()) {
        return;
    }
    const size_t       n_expert = index_.layers()[j.layer].n_expert;
    const float *      bias     = routers_.bias(j.layer);
    std::vector<float> logits(n_expert);
    for (uint32_t d = 1; d <= std::min<uint32_t>(j.layer, HOBBIT_MAX_LOOKAHEAD); ++d) {
        const sample & s = samples_[d - 1][j.pass % (HOBBIT_MAX_LOOKAHEAD + 1)];
        if (s.pass != j.pass || s.of_tokens != j.of_tokens || s.n_tokens != j.n_tokens) {
            continue;
        }
        gate_correction & correction = *corrections_[d - 1][j.layer];
        for (uint32_t i = 0; i < j.n_tokens; ++i) {
            for (size_t e = 0; e < n_expert; ++e) {
                logits[e] = j.logits[i * n_expert + e] + (bias == nullptr ? 0.0f : bias[e]);
            }
            correction.learn(s.rows.data() + i * (s.rows.size() / s.n_tokens), logits.data());
        }
    }
}

// The needs of the first k of what is predicted of a token; by `demand` what is read ahead is high.
static void assess_ahead(const policy::serving & how, uint32_t layer, const policy::prediction & of, uint32_t k,
                         policy::need * needs) {
    if (how.by_weight(k) && how.rule != policy::precision_rule::demand) {
        policy::assess(of.weights.data(), k, layer, how, needs, nullptr);
    }
}

void prefetcher::predict_token(const job & j) {
    std::vector<float>        logits;
    std::vector<expert_want>  wants;
    std::vector<policy::need> needs;
    policy::prediction        found;
    bool                      queue = true;
    for (uint32_t d = 1; d <= params_.prefetch_depth && j.layer + d < index_.layers().size(); ++d) {
        const uint32_t       to = j.layer + d;
        policy::router_shape shape;
        if (!routers_.shape(to, shape)) {
            continue;
        }
        logits.resize(shape.n_expert);
        if (!predict_logits(j, d, 0, logits.data())) {
            continue;
        }
        const uint32_t           n_used = shape.k;
        const uint32_t           n_read = std::min(n_used + params_.prefetch_extra, shape.n_expert);
        const std::vector<float> raw    = logits;
        shape.k                         = std::min(n_read + 1, shape.n_expert);  // one more, to see how far it is behind
        policy::predict_top_k(shape, logits.data(), routers_.selection_bias(to), found);

        guess now;
        now.bins.assign(n_read, prediction_odds::UNKNOWN);
        const auto & correction = corrections_[d - 1][to];
        const float  error      = correction ? correction->standard_error() : 0.0f;
        // What is read beyond the k that are expected is read however unlikely: that was asked for.
        for (uint32_t i = 0; error > 0.0f && n_used < found.experts.size() && i < n_used; ++i) {
            now.bins[i] = prediction_odds::bin((raw[found.experts[i]] - raw[found.experts[n_used]]) / error);
        }
        now.experts.assign(found.experts.begin(), found.experts.begin() + n_read);
        std::vector<float> chance;
        {
            std::lock_guard<std::mutex> lock(recall_mutex_);
            for (const uint8_t bin : now.bins) {
                chance.push_back(odds_[d - 1].chance(bin));
            }
            last_[d - 1][to] = now;
        }
        if (!queue) {
            continue;  // farther layers are predicted for the recall figures only
        }
        needs.assign(n_read, policy::need::high);  // what is read beyond the k that are expected, by any rule
        assess_ahead(j.how, to, found, n_used, needs.data());
        wants.clear();
        for (uint32_t i = 0; i < n_read; ++i) {
            if (chance[i] >= MIN_CHANCE[d - 1]) {
                expert_want w;
                w.expert = now.experts[i];
                w.need   = needs[i];
                wants.push_back(w);
            }
        }
        const bool all_there = store_.prefetch(to, d, wants) == 0;
        queue                = all_there || error > 0.0f;
    }
}

void prefetcher::predict_batch(const job & j) {
    // Practically every expert of the next layer is needed by a large batch; a small one is predicted token by token.
    const uint32_t       to = j.layer + 1;
    policy::router_shape shape;
    if (to >= index_.layers().size() || !routers_.shape(to, shape)) {
        return;
    }
    std::vector<uint32_t>     votes(shape.n_expert, 0);
    std::vector<policy::need> needs(shape.n_expert, policy::need::never), of_token;
    std::vector<float>        logits(shape.n_expert);
    policy::prediction        guess;
    for (uint32_t i = 0; i < j.n_tokens; ++i) {
        if (!predict_logits(j, 1, i, logits.data())) {
            return;
        }
        policy::predict_top_k(shape, logits.data(), routers_.selection_bias(to), guess);
        const auto k = (uint32_t) guess.experts.size();
        of_token.assign(k, policy::need::high);
        if (j.n_tokens == j.of_tokens) {  // of a sample nobody knows whether one of the other tokens needs it high
            assess_ahead(j.how, to, guess, k, of_token.data());
        }
        for (uint32_t s = 0; s < (j.how.limits(k) ? j.how.max_experts : k); ++s) {
            const uint32_t e = guess.experts[s];
            needs[e]         = std::max(needs[e], of_token[s]);
            votes[e]++;
        }
    }
    if (j.how.by_popularity(j.of_tokens)) {
        std::vector<policy::need> popular(shape.n_expert);
        policy::classify_popularity(votes.data(), shape.n_expert, j.how.prefill_low, popular.data());
        for (uint32_t e = 0; e < shape.n_expert; ++e) {
            needs[e] = std::min(needs[e], popular[e]);
        }
    }
    std::vector<expert_want> wants;
    for (uint32_t e = 0; e < shape.n_expert; ++e) {
        if (votes[e] > 0) {
            expert_want w;
            w.expert = (uint16_t) e;
            w.need   = needs[e];
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
        guess & last = last_[d][layer];
        if (last.experts.empty()) {
            continue;
        }
        predicted_[d] += k;
        for (size_t i = 0; i < last.experts.size(); ++i) {
            const bool chosen = std::find(ids, ids + k, (int32_t) last.experts[i]) != ids + k;
            odds_[d].observe(last.bins[i], chosen);
            right_[d] += chosen;
        }
        last = {};
    }
}

uint64_t prefetcher::bytes_learned(const expert_index & index, const hobbit_params & params) {
    uint64_t sum = 0;
    for_each_corrected(index, params, [&](uint32_t, uint32_t, uint32_t n_from, uint32_t n_to) {
        sum += gate_correction::bytes(n_from, n_to);
    });
    return sum;
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
