#include "gate-correction.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hobbit {

namespace {

constexpr float    RIDGE = 3.0f;  // samples' worth of belief that there is nothing to correct
constexpr double   FADE  = 0.05;  // of the mean errors, per sample
constexpr uint32_t FIRST = 8;     // samples before the first correction

// Of large ones every so many samples count after the first: to learn is to go through C three times and D twice, which no cache holds.
constexpr size_t   LARGE    = 40000;  // cells of both
constexpr uint32_t PRACTICE = 256;
constexpr uint32_t EVERY    = 4;

// So that a token takes no more than it takes with 128 experts (C) or 256 (D).
constexpr size_t MOST_FEATURES = 257;
constexpr size_t MOST_CELLS    = 260 * 256;

size_t n_folded(uint32_t n, uint32_t fold) { return (n + fold - 1) / fold; }

// Means of groups, scaled to the size of a single one's noise.
float * put_folded(const float * x, uint32_t n, uint32_t fold, float * to) {
    const float scale = 1.0f / std::sqrt((float) fold);
    for (uint32_t i = 0; i < n; i += fold) {
        *to++ = scale * std::accumulate(x + i, x + std::min(i + fold, n), 0.0f);
    }
    return to;
}

void add(float * to, const float * from, float factor, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        to[i] += factor * from[i];
    }
}

// Without what they have in common: it does not change which experts are chosen.
double variance(const float * x, size_t n) {
    const double mean = std::accumulate(x, x + n, 0.0) / (double) n;
    double       sum  = 0.0;
    for (size_t i = 0; i < n; ++i) {
        sum += (x[i] - mean) * (x[i] - mean);
    }
    return sum / (double) n;
}

}  // namespace

// Experts of a group.
static uint32_t fold_of(uint32_t n_from, uint32_t n_to) {
    const auto fits = [&](uint32_t fold) {
        const size_t n = n_folded(n_to, fold) + n_folded(n_from, fold) + 1;
        return n <= MOST_FEATURES && n * n_to <= MOST_CELLS;
    };
    uint32_t fold = 1;
    while (!fits(fold) && fold < std::max(n_from, n_to)) {
        fold++;
    }
    return fold;
}

size_t gate_correction::n_features(uint32_t n_from, uint32_t n_to) {
    const uint32_t fold = fold_of(n_from, n_to);
    return n_folded(n_to, fold) + n_folded(n_from, fold) + 1;
}

size_t gate_correction::sample_size(uint32_t n_from, uint32_t n_to) {
    return n_features(n_from, n_to) + (fold_of(n_from, n_to) > 1 ? n_to : 0);
}

size_t gate_correction::bytes(uint32_t n_from, uint32_t n_to) {
    const size_t n = n_features(n_from, n_to);
    return n * (n + n_to) * sizeof(float);
}

gate_correction::gate_correction(uint32_t n_from, uint32_t n_to) :
    n_from_(n_from),
    n_to_(n_to),
    fold_(fold_of(n_from, n_to)),
    n_(n_features(n_from, n_to)),
    d_(n_ * n_to),
    c_(n_ * n_),
    gain_(n_),
    error_(n_to) {}

void gate_correction::sample(const float * from, const float * predicted, float * sample) {
    std::copy_n(predicted, n_to_, sample);
    float * const f = sample + offset();
    put_folded(from, n_from_, fold_, put_folded(predicted, n_to_, fold_, f));
    if (!(one_ > 0.0f) || !std::isfinite(one_)) {
        one_ = std::sqrt(std::inner_product(f, f + n_ - 1, f, 0.0f) / (float) (n_ - 1));
    }
    f[n_ - 1] = one_;
}

void gate_correction::expected(const float * f, float * out) const {
    std::fill_n(out, n_to_, 0.0f);
    for (size_t i = 0; i < n_; ++i) {
        add(out, &d_[i * n_to_], f[i], n_to_);
    }
}

void gate_correction::correct(const float * sample, float * logits) {
    if (n_samples_ < FIRST || after_ >= before_) {
        return;
    }
    expected(sample + offset(), error_.data());
    add(logits, error_.data(), 1.0f, n_to_);
}

float gate_correction::standard_error() const {
    return n_samples_ < FIRST ? 0.0f : (float) std::sqrt(std::min(before_, after_));
}

void gate_correction::forget(const float * f) {
    const float square = std::inner_product(f, f + n_, f, 0.0f) / (float) n_;
    std::fill(c_.begin(), c_.end(), 0.0f);
    for (size_t i = 0; i < n_; ++i) {
        c_[i * n_ + i] = 1.0f / (RIDGE * std::max(square, 1e-12f));
    }
}

void gate_correction::learn(const float * sample, const float * actual) {
    if (c_.size() + d_.size() > LARGE && n_samples_ >= PRACTICE && ++n_passed_ % EVERY != 0) {
        return;
    }
    const float * f = sample + offset();
    if (n_samples_ % MEMORY == 0) {
        forget(f);
    }
    // gain = C f / (1 + f^T C f);  D += gain (actual - predicted - D^T f)^T;  C -= gain (C f)^T
    std::fill(gain_.begin(), gain_.end(), 0.0f);
    for (size_t i = 0; i < n_; ++i) {
        add(gain_.data(), &c_[i * n_], f[i], n_);
    }
    const float scale = 1.0f + std::inner_product(f, f + n_, gain_.begin(), 0.0f);

    expected(f, error_.data());
    float sum = 0.0f;  // finite when all are
    for (uint32_t e = 0; e < n_to_; ++e) {
        error_[e] = actual[e] - sample[e] - error_[e];
        sum += error_[e] + actual[e];
    }
    if (!(scale >= 1.0f) || !std::isfinite(scale) || !std::isfinite(sum)) {
        // Rounding has spoilt C, or these are not numbers.
        if (std::isfinite(sum)) {
            forget(f);
        }
        return;
    }
    const double after = variance(error_.data(), n_to_);
    for (size_t i = 0; i < n_; ++i) {
        add(&d_[i * n_to_], error_.data(), gain_[i] / scale, n_to_);
    }
    for (size_t i = 0; i < n_; ++i) {
        add(&c_[i * n_], gain_.data(), -gain_[i] / scale, n_);
    }
    for (uint32_t e = 0; e < n_to_; ++e) {
        error_[e] = actual[e] - sample[e];
    }
    const double before = variance(error_.data(), n_to_);
    const double weight = n_samples_ == 0 ? 1.0 : FADE;
    before_ += weight * (before - before_);
    after_ += weight * (after - after_);
    n_samples_++;
}

}  // namespace hobbit
