#include "mode.h"

#include <cstring>

namespace hobbit::policy {

static const mode MODES[] = {
    // The paper's system: mixed precision on a miss, layer-ahead prefetch, cost-aware eviction.
    { "hobbit", HOBBIT_PRECISION_MISS, HOBBIT_EVICT_FORESIGHT, 2, 0.05f, 0 },
    // Fate (arXiv 2502.12224): reads ahead in high precision what the next router says and one expert more, on demand in low; a
    // cache that favours the first layers, ARC in each. The share of low copies is not published.
    { "fate", HOBBIT_PRECISION_DEMAND, HOBBIT_EVICT_FATE, 1, 0.05f, 1 },
    // Load on demand with the plainest cache: the baseline.
    { "lru", HOBBIT_PRECISION_EXACT, HOBBIT_EVICT_LRU, 0, 0.0f, 0 },
};

const mode * find_mode(const char * name) {
    for (const mode & m : MODES) {
        if (name != nullptr && strcmp(m.name, name) == 0) {
            return &m;
        }
    }
    return nullptr;
}

const char * mode_names() { return "hobbit, fate, lru"; }

}  // namespace hobbit::policy
