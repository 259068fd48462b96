#include "context-memory.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-ext.h"

// upstream, private
#include "llama-context.h"

#include <cstring>

namespace hobbit {

// The buffer that ggml converts operands in, for the largest graph: no part of the compute buffers. With a long context and without flash
// attention that of the attention is half as large as they are.
static uint64_t work_bytes(const llama_context * context) {
    const llm_graph_result * largest = context->get_gf_res_reserve();
    if (largest == nullptr || largest->get_gf() == nullptr) {
        return 0;
    }
    return ggml_graph_plan(largest->get_gf(), (int) context->n_threads_batch(), nullptr).work_size;
}

context_bytes context_memory(const llama_context * context) {
    context_bytes out;
    for (const auto & item : llama_get_memory_breakdown(context)) {
        if (strcmp(ggml_backend_buft_name(item.first), "HOBBIT") == 0) {
            continue;
        }
        out.compute += item.second.compute;
        out.resident += item.second.model + item.second.context;
    }
    out.compute += work_bytes(context);
    return out;
}

}  // namespace hobbit
