// Eight rows of K-quants interleaved as upstream's kernels for repacked weights want them: the bytes that upstream's repacking
// gives, at two to three times its speed. Upstream does it once, at load; we do it for every expert that
// arrives, and there it took as much processor time as multiplying.
#pragma once

#include <cstddef>
#include <cstdint>

struct ggml_tensor;

namespace hobbit {

// `plain`: eight rows (group->ne[0] long) as in a file -> group->data, the same number of bytes elsewhere. 0, as upstream says "done".
int interleave_q4_K(ggml_tensor * group, const void * plain, size_t bytes);
int interleave_q2_K(ggml_tensor * group, const void * plain, size_t bytes);

}  // namespace hobbit
