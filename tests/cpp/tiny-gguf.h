// Small GGUFs of known contents, written by ggml's own code. A tensor's bytes follow from its name.
#pragma once

#include "temp-folder.h"

#include "ggml.h"
#include "gguf.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace test {

struct tiny_tensor {
    std::string          name;
    ggml_type            type;
    std::vector<int64_t> ne;
};

using tiny_tensors = std::vector<tiny_tensor>;
using metadata     = std::function<void(gguf_context *)>;

inline uint32_t seed_of(const std::string & name) {
    uint32_t h = 2166136261u;
    for (const char c : name) {
        h = (h ^ (unsigned char) c) * 16777619u;
    }
    return h;
}

inline void write_gguf(const std::string & path, const tiny_tensors & tensors, const metadata & meta) {
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> g(gguf_init_empty(), gguf_free);
    meta(g.get());
    ggml_init_params params = { ggml_tensor_overhead() * (tensors.size() + 1), nullptr, true };
    std::unique_ptr<ggml_context, void (*)(ggml_context *)> ctx(ggml_init(params), ggml_free);
    std::vector<bytes>                                      data;
    for (const tiny_tensor & t : tensors) {
        ggml_tensor * tensor = ggml_new_tensor(ctx.get(), t.type, (int) t.ne.size(), t.ne.data());
        ggml_set_name(tensor, t.name.c_str());
        data.push_back(content(seed_of(t.name), ggml_nbytes(tensor) + 1));
        tensor->data = data.back().data();
        gguf_add_tensor(g.get(), tensor);
    }
    if (!gguf_write_to_file(g.get(), path.c_str(), false)) {
        throw std::runtime_error("cannot write " + path);
    }
}

// A model of two kinds of block: block 0 is dense, the others have routed experts in F16 and perhaps low copies in Q4_0. Slices
// are no multiples of a page, so that direct reads bring in their neighbours too.
struct tiny_model {
    uint32_t n_layer = 3, n_expert = 8, n_used = 2;
    bool     low   = true;
    int64_t  n_in  = 64;  // of gate and up
    int64_t  n_out = 48;  // of gate and up; padded to Q4_0's 32 for down

    int64_t n_down_in() const { return (n_out + 31) / 32 * 32; }

    metadata meta() const {
        const tiny_model m = *this;
        return [m](gguf_context * g) {
            gguf_set_val_str(g, "general.architecture", "tiny");
            gguf_set_val_u32(g, "tiny.block_count", m.n_layer + 1);
            gguf_set_val_u32(g, "tiny.expert_count", m.n_expert);
            gguf_set_val_u32(g, "tiny.expert_used_count", m.n_used);
        };
    }

    tiny_tensors dense() const {
        return { { "token_embd.weight", GGML_TYPE_F32, { n_in, 10 } },
                 { "blk.0.ffn_down.weight", GGML_TYPE_F16, { n_in, 33 } } };
    }

    tiny_tensors high() const {
        tiny_tensors out;
        for (uint32_t l = 1; l <= n_layer; ++l) {
            const std::string block = "blk." + std::to_string(l) + ".";
            const int64_t     n     = n_expert;
            out.push_back({ block + "ffn_gate_inp.weight", GGML_TYPE_F32, { n_in, n } });
            out.push_back({ block + "ffn_down_exps.weight", GGML_TYPE_F16, { n_down_in(), n_in, n } });
            out.push_back({ block + "ffn_gate_exps.weight", GGML_TYPE_F16, { n_in, n_out, n } });
            out.push_back({ block + "ffn_up_exps.weight", GGML_TYPE_F16, { n_in, n_out, n } });
        }
        return out;
    }

    tiny_tensors low_copies() const {
        tiny_tensors out;
        for (tiny_tensor t : high()) {
            if (t.ne.size() == 3) {
                out.push_back({ "hobbit.low." + t.name, GGML_TYPE_Q4_0, t.ne });
            }
        }
        return out;
    }

    tiny_tensors all() const {
        tiny_tensors out = dense();
        for (const auto & more : { high(), low ? low_copies() : tiny_tensors {} }) {
            out.insert(out.end(), more.begin(), more.end());
        }
        return out;
    }

    void write(const std::string & path) const { write_gguf(path, all(), meta()); }
};

}  // namespace test
