#include "top-k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace hobbit::policy {

static void to_probabilities(const router_shape & shape, float * v) {
    const uint32_t n = shape.n_expert;
    switch (shape.function) {
        case gating::softmax:
        case gating::softmax_over_selected: {
            const float top = *std::max_element(v, v + n);
            float       sum = 0.0f;
            for (uint32_t i = 0; i < n; ++i) {
                v[i] = std::exp(v[i] - top);
                sum += v[i];
            }
            for (uint32_t i = 0; i < n; ++i) {
                v[i] /= sum;
            }
        } break;
        case gating::sigmoid:
            for (uint32_t i = 0; i < n; ++i) {
                v[i] = 1.0f / (1.0f + std::exp(-v[i]));
            }
            break;
        case gating::sqrt_softplus:
            for (uint32_t i = 0; i < n; ++i) {
                v[i] = std::sqrt(v[i] > 20.0f ? v[i] : std::log1p(std::exp(v[i])));
            }
            break;
    }
}

// Groups are ranked by the sum of their two best scores; experts of the others drop out.
static void mask_groups(const router_shape & shape, std::vector<float> & score) {
    const uint32_t     per = shape.n_expert / shape.n_group;
    std::vector<float> group(shape.n_group);
    for (uint32_t g = 0; g < shape.n_group; ++g) {
        float best = -std::numeric_limits<float>::infinity(), second = best;
        for (uint32_t i = g * per; i < (g + 1) * per; ++i) {
            if (score[i] > best) {
                second = best;
                best   = score[i];
            } else {
                second = std::max(second, score[i]);
            }
        }
        group[g] = per > 1 ? best + second : best;
    }
    std::vector<float> sorted = group;
    std::nth_element(sorted.begin(), sorted.begin() + (shape.n_group_used - 1), sorted.end(), std::greater<float>());
    for (uint32_t g = 0; g < shape.n_group; ++g) {
        if (group[g] < sorted[shape.n_group_used - 1]) {
            std::fill_n(score.begin() + g * per, per, -std::numeric_limits<float>::infinity());
        }
    }
}

void predict_top_k(const router_shape & shape, float * logits, const float * selection_bias, prediction & out) {
    const uint32_t n = shape.n_expert;
    const uint32_t k = std::min(shape.k, n);
    to_probabilities(shape, logits);

    std::vector<float> score(logits, logits + n);
    if (selection_bias != nullptr) {
        for (uint32_t i = 0; i < n; ++i) {
            score[i] += selection_bias[i];
        }
    }
    if (shape.n_group > 1 && shape.n_group_used >= 1 && shape.n_group_used < shape.n_group && n % shape.n_group == 0) {
        mask_groups(shape, score);
    }
    out.experts.resize(n);
    std::iota(out.experts.begin(), out.experts.end(), (uint16_t) 0);
    std::partial_sort(out.experts.begin(), out.experts.begin() + k, out.experts.end(),
                      [&](uint16_t a, uint16_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
    out.experts.resize(k);
    out.weights.resize(k);
    float sum = 0.0f;
    for (uint32_t i = 0; i < k; ++i) {
        out.weights[i] = logits[out.experts[i]];
        sum += out.weights[i];
    }
    for (float & w : out.weights) {
        w = sum > 0.0f ? w / sum : 1.0f / (float) k;
    }
}

}  // namespace hobbit::policy
