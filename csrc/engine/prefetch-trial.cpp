#include "prefetch-trial.h"

#include <algorithm>
#include <cstddef>

namespace hobbit {

static double median(std::vector<double> & v) {
    std::nth_element(v.begin(), v.begin() + (std::ptrdiff_t)(v.size() / 2), v.end());
    return v[v.size() / 2];
}

void prefetch_trial::measured(double seconds, bool anything_read) {
    if (!trying()) {
        if (++since_ >= PERIOD) {
            since_ = n_ = 0;
        }
        return;
    }
    if (!anything_read) {
        return;
    }
    if (n_ % BLOCK != 0) {
        times_[on()].push_back(seconds);
    }
    if (++n_ < 2 * N_EACH) {
        return;
    }
    ratio_ = median(times_[1]) / median(times_[0]);
    on_    = ratio_ < 1.0;
    times_[0].clear();
    times_[1].clear();
}

}  // namespace hobbit
