// The modes: rows of one table. A new idea is a new pure function and a new row.
#pragma once

#include "../hobbit.h"

#include <string>

namespace hobbit::policy {

struct mode {
    const char * name;
    int32_t      precision_rule;
    int32_t      eviction_rule;
    uint32_t     prefetch_depth;
    float        low_share;
    uint32_t     prefetch_extra;
    float        prefill_low     = 0.0f;
    bool         prefetch_always = false;
    bool         gate_correction = true;
};

// NULL for an unknown name.
const mode * find_mode(const char * name);

// "hobbit, fate, lru": for messages.
std::string mode_names();

}  // namespace hobbit::policy
