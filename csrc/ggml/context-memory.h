// What a llama context holds in ggml buffers, or will.
#pragma once

#include <cstdint>

struct llama_context;

namespace hobbit {

// Model and KV cache, in host memory, without the address range of the experts.
uint64_t resident_bytes(const llama_context * context);

// What batches take while they are computed.
struct batch_bytes {
    uint64_t buffers = 0;  // compute buffers
    // What ggml converts operands in: it grows with the largest graph so far, and is kept. With a long context and without flash attention
    // that of the attention is half as large as the buffers are.
    uint64_t work = 0;
};

// Lays the compute buffers out for batches of at most `n_tokens`, `n_outputs` of which want logits, so that these touch no more of them than is returned, and gives all of
// their pages back to the system. llama.cpp lays them out once, for n_ubatch tokens, and what a prompt has touched would stay until the
// end. Nothing in them is needed from one llama_decode to the next. `n_tokens` is cut to n_ubatch. Not while it computes. Throws
// HOBBIT_ERR_NO_MEMORY.
batch_bytes fit_batches(llama_context * context, uint32_t n_tokens, uint32_t n_outputs);

}  // namespace hobbit
