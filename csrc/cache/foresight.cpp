#include "foresight.h"

#include <algorithm>
#include <cmath>

namespace hobbit {

namespace {

// Rates follow with these steps, a token each.
constexpr float RECENT_STEP = 0.4f;
constexpr float RATE_STEP   = 0.01f;
// Per token `recency` moves by RECENCY_STEP x (LRU's lead - RECENCY_LEAK x recency x our misses), both as shares of all that was judged.
// Hence the leak: while the order is LRU's nobody can measure whether ours would have done better.
constexpr float RECENCY_STEP = 0.25f;
constexpr float RECENCY_LEAK = 0.05f;
// How much less a neighbour counts that shares fewer experts: e^-LIKENESS for one that shares none.
constexpr float LIKENESS = 20.0f;

}  // namespace

foresight::foresight(expert_cache & cache, uint32_t n_layer, uint32_t n_expert, float prior, float low_cost,
                     bool high_serves_low) :
    cache_(cache),
    n_layer_(n_layer),
    n_expert_(n_expert),
    low_cost_(low_cost),
    high_serves_low_(high_serves_low),
    n_words_(n_words(n_layer, n_expert)),
    bits_((size_t) HISTORY * n_words_),
    ages_(HISTORY) {
    for (uint32_t layer = 0; layer < n_layer; ++layer) {
        for (uint32_t e = 0; e < n_expert; ++e) {
            use_record & use = cache_.use(layer, e);
            use.recent = use.rate = prior;
            use.seen[0] = use.seen[1] = prior * FORESIGHT_TOTAL;
        }
    }
}

void foresight::observe(uint32_t layer, const int32_t * ids, size_t stride, uint32_t k, uint32_t n_tokens) {
    if (layer == 0) {
        batch_ = n_tokens_;
        n_tokens_ += n_tokens;
        for (uint32_t i = n_tokens > HISTORY ? n_tokens - HISTORY : 0; i < n_tokens; ++i) {
            std::fill_n(row(batch_ + i), n_words_, 0);
            ages_[(batch_ + i) % HISTORY] = 0;
        }
    }
    // Of a prompt llama.cpp computes the last layer for its last tokens only.
    const uint64_t first = n_tokens_ - std::min<uint64_t>(n_tokens, n_tokens_ - batch_);
    for (uint32_t i = 0; i < n_tokens; ++i) {
        for (uint32_t e = 0; e < n_expert_; ++e) {
            use_record & use = cache_.use(layer, e);
            use.recent *= 1.0f - RECENT_STEP;
            use.rate *= 1.0f - RATE_STEP;
        }
        const bool kept = n_tokens - i <= HISTORY && first + i < n_tokens_;
        for (uint32_t j = 0; j < k; ++j) {
            const auto   e   = (uint32_t) ids[i * stride + j];
            use_record & use = cache_.use(layer, e);
            if (n_tokens_ - batch_ == 1 && cache_.full(0)) {
                judge(cache_.find(layer, e, 0), cache_.find(layer, e, 1), use);
            }
            use.recent += RECENT_STEP;
            use.rate += RATE_STEP;
            if (kept) {
                if (use.used_at + HISTORY > n_tokens_ && use.used_at > 0) {
                    ages_[(use.used_at - 1) % HISTORY]--;
                }
                ages_[(first + i) % HISTORY]++;
                use.used_at        = first + i + 1;
                const uint32_t bit = layer * n_expert_ + e;
                row(first + i)[bit / 64] |= (uint64_t) 1 << (bit % 64);
            }
        }
    }
    if (layer + 1 == n_layer_) {
        n_whole_ = n_tokens_;
    }
}

// A use, before it is served. What is read ahead would be there by any rule.
void foresight::judge(const cache_entry * high, const cache_entry * low, const use_record & use) {
    if ((high != nullptr && high->prefetched) || (low != nullptr && low->prefetched)) {
        return;
    }
    const uint64_t age    = n_tokens_ - use.used_at;
    const float    lru    = use.used_at == 0 || age > lru_age_ + 1 ? 0.0f : age <= lru_age_ ? 1.0f : lru_part_;
    const float    of_low = (1.0f - use.high_share) * low_cost_;
    const float    all    = use.high_share + of_low;
    const bool     both   = low != nullptr || (high_serves_low_ && high != nullptr);
    const float    ours   = (high != nullptr ? use.high_share : 0.0f) + (both ? of_low : 0.0f);
    ahead_ += lru * all - ours;
    misses_ += all - ours;
    judged_ += all;
}

// At the end of a token.
void foresight::follow_lru() {
    if (judged_ > 0.0f) {
        const float step = RECENCY_STEP * (ahead_ - RECENCY_LEAK * recency_ * misses_) / judged_;
        recency_         = std::clamp(recency_ + step, 0.0f, 1.0f);
    }
    ahead_ = misses_ = judged_ = 0.0f;

    // What LRU would hold of each expert: both copies where low needs are served by the low one alone.
    const uint64_t * bytes  = cache_.shape().slot_bytes;
    const uint64_t   each   = bytes[0] + (low_cost_ == 0.0f || high_serves_low_ ? 0 : bytes[1]);
    uint64_t         left   = cache_.used_bytes() / std::max<uint64_t>(each, 1);
    const uint64_t   oldest = std::min<uint64_t>(HISTORY, n_tokens_);
    const auto       used   = [this](uint64_t age) { return ages_[(n_tokens_ - age) % HISTORY]; };
    lru_age_                = 0;
    while (lru_age_ < oldest && used(lru_age_ + 1) <= left) {
        left -= used(++lru_age_);
    }
    lru_part_ = lru_age_ < oldest ? (float) left / (float) used(lru_age_ + 1) : 0.0f;
}

uint32_t foresight::overlap(const uint64_t * a, const uint64_t * b) const {
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_words_; ++i) {
        n += (uint32_t) __builtin_popcountll(a[i] & b[i]);
    }
    return n;
}

// seen[0] begins with the token after the neighbour, seen[1] with the one after that: for layers that the running token has
// passed already.
void foresight::add_followers(uint64_t neighbour, float weight) {
    float discount = weight;
    for (uint32_t h = 0; h <= HORIZON; ++h, discount *= FORESIGHT_GAMMA) {
        const uint64_t token = neighbour + 1 + h;
        const float    now[] = { h < HORIZON ? discount : 0.0f, h > 0 ? discount / FORESIGHT_GAMMA : 0.0f };
        if (token >= n_whole_) {
            unknown_[0] += now[0];
            unknown_[1] += now[1];
            continue;
        }
        const uint64_t * bits = row(token);
        for (uint32_t i = 0; i < n_words_; ++i) {
            for (uint64_t left = bits[i]; left != 0; left &= left - 1) {
                const uint32_t at  = i * 64 + (uint32_t) __builtin_ctzll(left);
                use_record &   use = cache_.use(at / n_expert_, at % n_expert_);
                use.seen[0] += now[0];
                use.seen[1] += now[1];
            }
        }
    }
}

void foresight::refresh() {
    if (fresh_for_ == n_whole_ || n_whole_ == 0) {
        return;
    }
    fresh_for_ = n_whole_;
    follow_lru();

    struct likeness {
        uint32_t common;
        uint64_t token;
    };

    std::vector<likeness> found;
    const uint64_t        last   = n_whole_ - 1;
    const uint64_t        oldest = n_tokens_ > HISTORY ? n_tokens_ - HISTORY : 0;
    found.reserve(HISTORY);
    for (uint64_t t = oldest; t < last; ++t) {
        found.push_back({ overlap(row(t), row(last)), t });
    }
    const size_t n = std::min<size_t>(NEIGHBOURS, found.size());
    std::partial_sort(found.begin(), found.begin() + (ptrdiff_t) n, found.end(), [](const likeness & a, const likeness & b) {
        return a.common != b.common ? a.common > b.common : a.token > b.token;
    });

    const auto total = (float) std::max(overlap(row(last), row(last)), 1u);
    float      sum   = 0.0f;
    for (size_t i = 0; i < n; ++i) {
        sum += std::exp(LIKENESS * ((float) found[i].common - (float) found[0].common) / total);
    }
    for (uint32_t layer = 0; layer < n_layer_; ++layer) {
        for (uint32_t e = 0; e < n_expert_; ++e) {
            use_record & use = cache_.use(layer, e);
            use.seen[0] = use.seen[1] = 0.0f;
        }
    }
    unknown_[0] = unknown_[1] = n == 0 ? FORESIGHT_TOTAL : 0.0f;
    for (size_t i = 0; i < n; ++i) {
        add_followers(found[i].token,
                      std::exp(LIKENESS * ((float) found[i].common - (float) found[0].common) / total) / sum);
    }
    // What has not happened yet, at the long-run rate.
    for (uint32_t layer = 0; layer < n_layer_; ++layer) {
        for (uint32_t e = 0; e < n_expert_; ++e) {
            use_record & use = cache_.use(layer, e);
            use.seen[0] += unknown_[0] * use.rate;
            use.seen[1] += unknown_[1] * use.rate;
        }
    }
}

void foresight::begin_sequence() {
    for (uint32_t layer = 0; layer < n_layer_; ++layer) {
        for (uint32_t e = 0; e < n_expert_; ++e) {
            use_record & use = cache_.use(layer, e);
            use.recent       = use.rate;
        }
    }
}

}  // namespace hobbit
