// What no cache of a size can do better: Belady's optimum over a trace.
#pragma once

#include "../policy/precision.h"

#include <cstdint>
#include <vector>

namespace hobbit {

// One selection after the other, in the order of the trace.
struct bound_request {
    uint32_t     expert;  // layer * n_expert + expert
    policy::need need;
};

struct bound_result {
    uint64_t hits       = 0;  // selections that nothing had to be read for, and that were not skipped
    uint64_t skips      = 0;
    uint64_t selections = 0;
    uint64_t n_tokens   = 0;
    uint64_t bytes      = 0;  // read
};

// The fewest bytes that have to be read on demand, with `capacity` bytes of cache: what is needed farthest in the future goes
// (Belady 1966). With one precision (all needs high, capacity a multiple of bytes_high) that is the optimum of whole experts,
// selection by selection, nothing of the running layer being protected.
//
// The textbook's optimum lets every expert that is read go through the cache. `may_pass`: what is not needed for longest need not get in,
// which saves some 0.05 % of the selections more.
//
// With two sizes the optimum is not computable in practice; this is a lower bound of it. The low copy is taken to be the first
// bytes_low bytes of the high one, and any byte may be kept without the others. Every byte is then a page of its own, all pages cost
// the same, and farthest-in-the-future is exactly optimal for them; a cache of whole copies can only read more.
bound_result belady(const std::vector<bound_request> & requests, uint32_t n_experts, uint64_t bytes_high, uint64_t bytes_low,
                    uint64_t capacity, bool may_pass);

}  // namespace hobbit
