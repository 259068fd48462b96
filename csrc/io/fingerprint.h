// What tells the routed experts of a model from those of any other, cheaply: it binds a sidecar to its model.
//
// SHA-256 over, for each expert tensor in the order of the names: name, type, shape, and samples of its bytes. The samples are spread
// evenly from the first bytes of the first expert to the last of the last; a small tensor is hashed whole. So a load reads some
// MB and not the model. Names of files, metadata, places of tensors and the division into parts do not count: a model may be
// renamed, split, merged or given another chat template and keeps its sidecar. Other weights, also the same ones in another
// type, do not. A change of single bytes between the samples goes unnoticed: this tells models apart, not damage.
#pragma once

#include <string>

namespace hobbit {

class expert_index;

// "sha256:" and 64 hexadecimal digits. Throws HOBBIT_ERR_READ.
std::string fingerprint(const expert_index & index);

}  // namespace hobbit
