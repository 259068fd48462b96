// Where the router speaks: a node in the graph between the router weights and the expert products.
#pragma once

#include "ggml.h"
#include "hobbit-hooks.h"

namespace hobbit {

// The hook of build_moe_ffn. For experts of ours adds a node that hands ids, weights and router input to the session
// (session::route) and gives back the weights to compute with; otherwise returns `weights`. As sources of that node all
// three are alive when it runs. Also learns the layer's router, for predictions.
ggml_tensor * build_route(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, ggml_tensor * input,
                          const hobbit_moe & moe);

}  // namespace hobbit
