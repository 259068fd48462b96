// Compute threads that outlive a graph.
#pragma once

#include <memory>

namespace hobbit {

// As many as `context` (a llama_context) has for batches or single tokens, attached to it; it is to be freed before them. NULL for a
// single thread. Throws HOBBIT_ERR_NO_MEMORY.
std::shared_ptr<void> attach_threads(void * context);

}  // namespace hobbit
