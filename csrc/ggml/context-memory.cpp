#include "context-memory.h"

#include "ggml-backend.h"
#include "llama-ext.h"

#include <cstring>

namespace hobbit {

context_bytes context_memory(const llama_context * context) {
    context_bytes out;
    for (const auto & item : llama_get_memory_breakdown(context)) {
        if (strcmp(ggml_backend_buft_name(item.first), "HOBBIT") == 0) {
            continue;
        }
        out.compute += item.second.compute;
        out.resident += item.second.model + item.second.context;
    }
    return out;
}

}  // namespace hobbit
