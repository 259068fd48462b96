#include "mode.h"

#include <cstring>

namespace hobbit::policy {

static const mode MODES[] = {
    // The paper's system: mixed precision on a miss, layer-ahead prefetch, cost-aware eviction.
    { "hobbit", HOBBIT_PRECISION_MISS, HOBBIT_EVICT_FORESIGHT, 1, 0.05f },
    // Load on demand with the plainest cache: the baseline.
    { "lru", HOBBIT_PRECISION_EXACT, HOBBIT_EVICT_LRU, 0, 0.0f },
};

const mode * find_mode(const char * name) {
    for (const mode & m : MODES) {
        if (name != nullptr && strcmp(m.name, name) == 0) {
            return &m;
        }
    }
    return nullptr;
}

const char * mode_names() { return "hobbit, lru"; }

}  // namespace hobbit::policy
