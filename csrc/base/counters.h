// The counters of hobbit_counts, in one table: added up, reset and tested through it.
#pragma once

#include "../hobbit.h"

namespace hobbit {

// X(field)
#define HOBBIT_COUNTERS(X) \
    X(selections)          \
    X(hits_high)           \
    X(hits_low)            \
    X(loads_high)          \
    X(loads_low)           \
    X(skips)               \
    X(mass_total)          \
    X(mass_low)            \
    X(mass_skipped)        \
    X(cost_asked)          \
    X(cost_low)            \
    X(prefetches)          \
    X(prefetches_useful)   \
    X(prefetches_late)     \
    X(prefetches_wasted)   \
    X(bytes_demand)        \
    X(bytes_prefetch)      \
    X(bytes_wasted)        \
    X(stall_seconds)       \
    X(expert_seconds)

inline void add_counts(hobbit_counts & to, const hobbit_counts & from) {
#define X(field) to.field += from.field;
    HOBBIT_COUNTERS(X)
#undef X
}

}  // namespace hobbit
