// What the patches call: the whole of our code that is compiled into libllama.
//
// A table of two functions, empty until the core of hobbit-cpp fills it in. While it is empty each hook is a test of a null
// pointer, and libllama does what it would do without the patches.
#pragma once

#include "ggml.h"

#include <cstring>

#if defined(__GNUC__)
#    define HOBBIT_HOOK_API __attribute__((visibility("default")))
#else
#    define HOBBIT_HOOK_API
#endif

// What build_moe_ffn knows of a layer's router and experts. Tensors that a model does not have are NULL.
struct hobbit_moe {
    ggml_tensor * gate_inp;        // router [n_embd, n_expert]
    ggml_tensor * gate_inp_b;      // its bias [n_expert]
    ggml_tensor * selection_bias;  // added to the probabilities for the ranking only [n_expert]
    ggml_tensor * up;
    ggml_tensor * gate;
    ggml_tensor * down;
    ggml_tensor * gate_up;
    int           gating;  // llama_expert_gating_func_type
};

struct hobbit_hook_table {
    // The tensor's data stays on disk: do not load it.
    bool (*owns)(const ggml_tensor * tensor);
    // Called where the graph of a layer knows its router weights [1, k, n_tokens] and ids [k, n_tokens]. Returns the weights to go on
    // with.
    ggml_tensor * (*route)(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, const hobbit_moe & moe);
};

extern "C" HOBBIT_HOOK_API hobbit_hook_table * hobbit_hooks(void);

// Low-precision copies in a GGUF made by `hobbit convert`: not part of the model as llama.cpp knows it.
inline bool hobbit_is_low_copy(const char * tensor_name) { return strncmp(tensor_name, "hobbit.low.", 11) == 0; }

inline bool hobbit_owns(const ggml_tensor * tensor) {
    return hobbit_hooks()->owns != nullptr && hobbit_hooks()->owns(tensor);
}

inline ggml_tensor * hobbit_route(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * ids, const hobbit_moe & moe) {
    return hobbit_hooks()->route == nullptr ? weights : hobbit_hooks()->route(ctx, weights, ids, moe);
}
