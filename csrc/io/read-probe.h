// What the disk gives to reads as the engine makes them: direct, of whole expert slices, at random places of the model's own file(s).
#pragma once

#include "expert-index.h"

namespace hobbit {

struct read_probe_result {
    uint64_t reads   = 0;
    uint64_t bytes   = 0;
    double   seconds = 0.0;
};

// Keeps `depth` slices of `p` under way on an io_pool of as many threads for about `seconds`, and lets the last ones end. Every call reads
// other places: what a disk or a host kept of the last call's must not serve this one's. Throws HOBBIT_ERR_READ; HOBBIT_ERR_STATE when
// there is no copy in this precision.
read_probe_result probe_reads(const expert_index & index, precision p, uint32_t depth, double seconds);

}  // namespace hobbit
