// Compute threads that outlive a graph.
#pragma once

#include <memory>

namespace hobbit {

// As many as `context` (a llama_context) has for batches or single tokens, attached to it. It must not compute after what is returned is
// gone. NULL for a single thread.
std::shared_ptr<void> attach_threads(void * context);

}  // namespace hobbit
