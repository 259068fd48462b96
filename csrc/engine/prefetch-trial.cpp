#include "prefetch-trial.h"

#include <algorithm>
#include <cstddef>

namespace hobbit {

static double median(std::vector<double> v) {
    if (v.empty()) {
        return 0.0;
    }
    std::nth_element(v.begin(), v.begin() + (std::ptrdiff_t)(v.size() / 2), v.end());
    return v[v.size() / 2];
}

// The median over all pairs of tokens of the same kind (Theil and Sen): a token that was slow for another reason does not decide.
double prefetch_trial::seconds_a_byte(const std::vector<token> (&tokens)[2]) {
    std::vector<double> slopes;
    for (const std::vector<token> & kind : tokens) {
        for (size_t i = 0; i < kind.size(); ++i) {
            for (size_t j = 0; j < i; ++j) {
                if (kind[i].bytes != kind[j].bytes) {
                    slopes.push_back((kind[i].seconds - kind[j].seconds) / (kind[i].bytes - kind[j].bytes));
                }
            }
        }
    }
    return std::max(median(std::move(slopes)), 0.0);
}

void prefetch_trial::measured(double seconds, uint64_t bytes) {
    if (!trying()) {
        if (++since_ >= PERIOD) {
            since_ = n_ = 0;
        }
        return;
    }
    if (bytes == 0) {
        return;
    }
    if (n_ % BLOCK != 0) {
        tokens_[on()].push_back({ seconds, (double) bytes });
    }
    if (++n_ < 2 * N_EACH) {
        return;
    }
    const double        slope = seconds_a_byte(tokens_);
    std::vector<double> bytes_of_all;
    for (const std::vector<token> & kind : tokens_) {
        for (const token & t : kind) {
            bytes_of_all.push_back(t.bytes);
        }
    }
    const double usual = median(std::move(bytes_of_all));
    double       times[2];
    for (int with : { 0, 1 }) {
        std::vector<double> alike;
        for (const token & t : tokens_[with]) {
            alike.push_back(t.seconds - slope * (t.bytes - usual));
        }
        times[with] = median(std::move(alike));
        tokens_[with].clear();
    }
    ratio_ = times[0] > 0.0 ? times[1] / times[0] : 1.0;
    on_    = ratio_ < 1.0;
}

}  // namespace hobbit
