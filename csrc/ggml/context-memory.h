// What a llama context holds in ggml buffers, or will.
#pragma once

#include <cstdint>

struct llama_context;

namespace hobbit {

struct context_bytes {
    uint64_t compute  = 0;  // scratch of the graphs; touched only when a batch of full size runs
    uint64_t resident = 0;  // model and KV cache
};

// Host memory only, without the address range of the experts. Not while it computes.
context_bytes context_memory(const llama_context * context);

}  // namespace hobbit
