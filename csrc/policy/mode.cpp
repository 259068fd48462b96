#include "mode.h"

#include "precision.h"

#include <cstring>

namespace hobbit::policy {

static const mode MODES[] = {
    // HOBBIT's mixed precision on a miss and its layer-ahead prefetch (arXiv 2411.01433); what is evicted is ours.
    { "hobbit", HOBBIT_PRECISION_MISS, HOBBIT_EVICT_FORESIGHT, 2, 0.05f, 0 },
    // Fate (arXiv 2502.12224): reads ahead in high precision what the next router says and one expert more, on demand in low, so that
    // reading ahead always pays, by predictions as they are; a cache that favours the first layers, ARC in each; in prompts the
    // least popular experts in low precision. The share of low copies is not published.
    { "fate", HOBBIT_PRECISION_DEMAND, HOBBIT_EVICT_FATE, 1, 0.05f, 1, UNPOPULAR_SHARE, true, false },
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

std::string mode_names() {
    std::string out;
    for (const mode & m : MODES) {
        out += (out.empty() ? "" : ", ") + std::string(m.name);
    }
    return out;
}

}  // namespace hobbit::policy
