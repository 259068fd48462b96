// Where the router speaks: a node in the graph between the router weights and the expert products.
#pragma once

#include "ggml.h"
#include "hobbit-hooks.h"

namespace hobbit {

// The hook of build_moe_ffn. For experts of ours adds a node that hands ids, weights, router input and logits to the session
// (session::route) and gives back the weights to compute with; otherwise returns `weights`. As sources of that node all
// four are alive when it runs. The router and its input are looked up in the graph behind `ids`, and learnt for
// predictions.
ggml_tensor * build_route(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, const hobbit_moe & moe);

// Whether `t` is such a node.
bool is_route(const ggml_tensor * t);

}  // namespace hobbit
