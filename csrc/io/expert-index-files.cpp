// Of the index: what is read of GGUF headers.
#include "expert-index.h"

#include "../base/error.h"
#include "fingerprint.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <regex>

namespace hobbit {

namespace {

struct gguf_deleter {
    void operator()(gguf_context * c) const { gguf_free(c); }
};

// What ggml_new_tensor asserts; llama.cpp makes a tensor of it next.
bool countable(const int64_t * ne) {
    int64_t n = ne[0];
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        if (ne[i] > 1) {
            if (INT64_MAX / ne[i] <= n) {
                return false;
            }
            n *= ne[i];
        }
    }
    return true;
}

// `blk.<N>.<projection>_exps.weight` -> N and <projection>_exps; false for other names.
bool parse_name(const std::string & name, uint32_t & block, std::string & what) {
    static const std::regex pattern(R"(^blk\.(\d{1,6})\.([a-z_0-9]+_(?:ch)?exps)\.weight$)");
    std::smatch             match;
    if (!std::regex_match(name, match, pattern)) {
        return false;
    }
    block = (uint32_t) std::stoul(match[1]);
    what  = match[2];
    return true;
}

bool is_low_copy(const std::string & name) { return name.compare(0, strlen(LOW_PREFIX), LOW_PREFIX) == 0; }

// Where there is a value per block; empty where it is one for all.
std::vector<uint32_t> read_per_block(const gguf_context * g, const std::string & key) {
    const int64_t id = gguf_find_key(g, key.c_str());
    if (id < 0 || gguf_get_kv_type(g, id) != GGUF_TYPE_ARRAY ||
        (gguf_get_arr_type(g, id) != GGUF_TYPE_UINT32 && gguf_get_arr_type(g, id) != GGUF_TYPE_INT32)) {
        return {};
    }
    const auto * v = (const uint32_t *) gguf_get_arr_data(g, id);
    return { v, v + gguf_get_arr_n(g, id) };
}

uint32_t read_u32(const gguf_context * g, const std::string & key, uint32_t otherwise) {
    const int64_t id = gguf_find_key(g, key.c_str());
    if (id < 0) {
        return otherwise;
    }
    switch (gguf_get_kv_type(g, id)) {
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(g, id);
        case GGUF_TYPE_INT32:
            return (uint32_t) std::max(0, gguf_get_val_i32(g, id));
        case GGUF_TYPE_UINT16:
            return gguf_get_val_u16(g, id);
        case GGUF_TYPE_UINT64:
            return (uint32_t) gguf_get_val_u64(g, id);
        case GGUF_TYPE_ARRAY: {  // a value per layer: the largest serves for sizes
            const std::vector<uint32_t> values = read_per_block(g, key);
            return values.empty() ? otherwise : *std::max_element(values.begin(), values.end());
        }
        default:
            return otherwise;
    }
}

std::string read_string(const gguf_context * g, const char * key) {
    const int64_t id = gguf_find_key(g, key);
    return id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_STRING ? gguf_get_val_str(g, id) : "";
}

// model-00001-of-00004.gguf -> the name of part `no` (from 0).
std::string split_name(const std::string & path, uint32_t no, uint32_t count) {
    const std::string first = format("-%05u-of-%05u.gguf", 1u, count);
    if (path.size() <= first.size() || path.compare(path.size() - first.size(), first.size(), first) != 0) {
        fail(HOBBIT_ERR_FORMAT,
             path + " is part of a split model; open the part called *-00001-of-" + format("%05u.gguf", count));
    }
    return path.substr(0, path.size() - first.size()) + format("-%05u-of-%05u.gguf", no + 1, count);
}

// What a header comes to take, at most, while a model is loaded: by llama.cpp's vocabulary and maps, and copies of llama_cpp. Measured: 124 MiB
// of 11 (400,000 words), 112 of 16 (200,000 words, 446,000 merges that the tokenizer does not use), 235 of 62 (a long text and 300,000
// numbers), 82 of 19 (a long text).
uint64_t parsed_bytes(const gguf_context * g) {
    constexpr uint64_t COPIES = 4, A_STRING = 220;
    uint64_t           n_strings = 0;
    for (int64_t i = 0; i < gguf_get_n_kv(g); ++i) {
        if (gguf_get_kv_type(g, i) == GGUF_TYPE_ARRAY && gguf_get_arr_type(g, i) == GGUF_TYPE_STRING) {
            n_strings += gguf_get_arr_n(g, i);
        }
    }
    return COPIES * gguf_get_data_offset(g) + A_STRING * n_strings;
}

}  // namespace

// An open header.
struct expert_index::header {
    std::string                                 path;
    uint16_t                                    file_id;
    std::unique_ptr<gguf_context, gguf_deleter> gguf;
};

void expert_index::read_model(const std::string & path, bool direct) {
    uint32_t n_tensors = 0;
    uint32_t expected  = 0;
    bool     output    = false;
    for_each_part(path, direct, [&](const header & part, uint32_t no) {
        const gguf_context * g = part.gguf.get();
        if (no == 0) {
            const std::string arch = read_string(g, "general.architecture");
            if (arch == SIDECAR_ARCHITECTURE) {
                fail(HOBBIT_ERR_FORMAT,
                     path + " is a sidecar, which has only low-precision copies: open the model it was made for" +
                         (read_string(g, "hobbit.source").empty() ? "" : ", ") + read_string(g, "hobbit.source"));
            }
            n_block       = read_u32(g, arch + ".block_count", 0);
            n_nextn       = read_u32(g, arch + ".nextn_predict_layers", 0);
            bytes_parsed  = parsed_bytes(g);
            n_expert_used = read_u32(g, arch + ".expert_used_count", 0);
            used_         = read_per_block(g, arch + ".expert_used_count");
            n_expert_said = read_u32(g, arch + ".expert_count", 0);
            n_group       = read_u32(g, arch + ".expert_group_count", 0);
            n_group_used  = read_u32(g, arch + ".expert_group_used_count", 0);
            expected      = read_u32(g, "split.tensors.count", 0);
        }
        for (int64_t i = 0; i < gguf_get_n_tensors(g); ++i) {
            const std::string name   = gguf_get_tensor_name(g, i);
            const bool        is_low = is_low_copy(name);
            n_tensors++;
            if (!add_tensor(part, i, is_low ? name.substr(strlen(LOW_PREFIX)) : name, is_low)) {
                bytes_dense += gguf_get_tensor_size(g, i);
            }
            if (name == "token_embd.weight") {
                add_embeddings(part, i);
            }
            output = output || name == "output.weight";
        }
    });
    if (!output) {
        embeddings_ = {};  // the logits are products of all of it
    }
    if (expected != 0 && expected != n_tensors) {
        fail(HOBBIT_ERR_FORMAT,
             format("the parts of %s do not belong together: %u tensors expected, %u found; download all parts again",
                    path.c_str(), expected, n_tensors));
    }
}

void expert_index::read_sidecar(const std::string & path, bool direct) {
    for (const auto & layer : layers_) {
        for (const auto & p : layer.projections) {
            if (p.source[1].type >= 0) {
                fail(HOBBIT_ERR_SIDECAR, path_ + " has low-precision copies already: it takes no sidecar (" + path + ")");
            }
        }
    }
    for_each_part(path, direct, [&](const header & part, uint32_t no) {
        const gguf_context * g = part.gguf.get();
        if (no == 0) {
            const std::string made_for = read_string(g, FINGERPRINT_KEY);
            if (made_for.empty()) {
                fail(HOBBIT_ERR_SIDECAR, path + " is not a sidecar: make one with `hobbit convert MODEL --sidecar`");
            }
            const std::string source = read_string(g, "hobbit.source");
            if (made_for != fingerprint(*this)) {
                fail(HOBBIT_ERR_SIDECAR, path + " does not belong to " + path_ + ": it was made for another model" +
                                             (source.empty() ? "" : " (" + source + ")") +
                                             " or for another version of this one");
            }
        }
        for (int64_t i = 0; i < gguf_get_n_tensors(g); ++i) {
            const std::string name  = gguf_get_tensor_name(g, i);
            const std::string high  = is_low_copy(name) ? name.substr(strlen(LOW_PREFIX)) : "";
            uint32_t          block = 0;
            std::string       what;
            const bool        known = find(high).first >= 0 || (parse_name(high, block, what) && is_nextn(block));
            if (!known || !add_tensor(part, i, high, true)) {
                fail(HOBBIT_ERR_SIDECAR,
                     part.path + ": tensor " + name + " is no low-precision copy of an expert tensor of " + path_);
            }
        }
    });
    has_low = true;
    for (const auto & layer : layers_) {
        for (const auto & p : layer.projections) {
            if (p.source[1].type < 0) {
                fail(HOBBIT_ERR_SIDECAR,
                     path + " has no low-precision copy of " + p.name + ": it is not whole, make it again");
            }
        }
    }
}

void expert_index::for_each_part(const std::string & path, bool direct,
                                 const std::function<void(const header &, uint32_t no)> & body) {
    // What the parts of one model agree in, where they have it: the second is written by `hobbit convert`.
    static const char * const COMMON_KEYS[] = { "general.architecture", "hobbit.split.model" };
    constexpr size_t          N_COMMON      = sizeof(COMMON_KEYS) / sizeof(*COMMON_KEYS);
    std::string               common[N_COMMON];

    uint32_t n_parts = 1;
    for (uint32_t no = 0; no < n_parts; ++no) {
        header part;
        part.path = no == 0 ? path : split_name(path, no, n_parts);
        files_.push_back(std::make_unique<file>(part.path, direct));
        part.file_id = (uint16_t) (files_.size() - 1);

        // Without ggml tensors, whose making aborts the process for some damaged shapes.
        part.gguf.reset(gguf_init_from_file(part.path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
        const gguf_context * g = part.gguf.get();
        file &               f = *files_.back();
        if (g == nullptr) {
            f.remember(16u << 20);  // throws when the disk is the reason
            fail(HOBBIT_ERR_FORMAT,
                 part.path + " is not a readable GGUF: its header is damaged, cut short, or of an unknown version");
        }
        f.remember(gguf_get_data_offset(g));
        const uint32_t count = std::max(1u, read_u32(g, "split.count", 1));
        if (no == 0) {
            n_parts = count;
            if (n_parts > 1) {
                split_name(path, 0, n_parts);  // or says which part to open
            }
        }
        if (n_parts > 1 && (read_u32(g, "split.no", UINT32_MAX) != no || count != n_parts)) {
            fail(HOBBIT_ERR_FORMAT,
                 format("%s says that it is not part %u of %u: was it renamed?", part.path.c_str(), no + 1, n_parts));
        }
        for (size_t i = 0; i < N_COMMON; ++i) {
            const std::string own = read_string(g, COMMON_KEYS[i]);
            common[i]             = no == 0 ? own : common[i];
            if (!own.empty() && own != common[i]) {
                fail(HOBBIT_ERR_FORMAT, part.path + " is part of another model than " + path + ": download it again");
            }
        }
        body(part, no);
    }
}

void expert_index::add_embeddings(const header & part, int64_t i) {
    const gguf_context * g    = part.gguf.get();
    const ggml_type      type = gguf_get_tensor_type(g, i);
    const int64_t *      ne   = gguf_get_tensor_ne(g, i);
    if (ne[0] < 1 || ne[1] < 1 || ne[1] > INT32_MAX || ne[2] != 1 || ne[3] != 1 ||
        (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr)) {
        return;
    }
    const uint64_t offset = gguf_get_data_offset(g) + gguf_get_tensor_offset(g, i);
    const uint64_t row    = ggml_row_size(type, ne[0]);
    embeddings_           = { gguf_get_tensor_name(g, i), ne[0], ne[1], { (int32_t) type, part.file_id, offset, row, row } };
}

// Adds tensor `i` of a file when it is one of routed experts. `name`: of the tensor in high precision.
bool expert_index::add_tensor(const header & part, int64_t i, const std::string & name, bool is_low) {
    const gguf_context * g      = part.gguf.get();
    const file &         f      = *files_[part.file_id];
    const std::string    full   = gguf_get_tensor_name(g, i);
    const ggml_type      type   = gguf_get_tensor_type(g, i);
    const int64_t *      ne     = gguf_get_tensor_ne(g, i);
    const uint64_t       bytes  = gguf_get_tensor_size(g, i);
    const uint64_t       offset = gguf_get_data_offset(g) + gguf_get_tensor_offset(g, i);
    if (!countable(ne)) {
        fail(HOBBIT_ERR_FORMAT, part.path + ": the shape of tensor " + full + " is damaged");
    }
    if (offset > f.size() || bytes > f.size() - offset) {
        fail(HOBBIT_ERR_FORMAT, format("%s is cut short: tensor %s ends at byte %" PRIu64 ", the file has %" PRIu64
                                       "; download or convert it again",
                                       part.path.c_str(), full.c_str(), offset + bytes, f.size()));
    }
    uint32_t    block = 0;
    std::string what;
    if (!parse_name(name, block, what) || ne[2] < 2 || ne[3] != 1) {
        return false;
    }
    if (is_nextn(block)) {
        return true;
    }
    if (ne[0] < 1 || ne[1] < 1) {
        fail(HOBBIT_ERR_FORMAT, part.path + ": tensor " + full + " has no elements");
    }
    if (ne[2] > UINT16_MAX) {
        fail(HOBBIT_ERR_UNSUPPORTED, part.path + ": tensor " + full + " has more than 65535 experts");
    }

    // Two expert sets in one block (chexps) are two layers to the engine: each has a router call of its own.
    const bool  ch    = is_chunked(what);
    moe_layer * layer = nullptr;
    for (auto & l : layers_) {
        if (l.block == block && l.chunked() == ch) {
            layer = &l;
        }
    }
    if (layer == nullptr) {
        layers_.emplace_back();
        layer           = &layers_.back();
        layer->block    = block;
        layer->n_expert = (uint32_t) ne[2];
    }
    projection * proj = nullptr;
    for (auto & p : layer->projections) {
        proj = p.name == name ? &p : proj;
    }
    if (proj == nullptr) {
        layer->projections.emplace_back();
        proj          = &layer->projections.back();
        proj->name    = name;
        proj->n_in    = ne[0];
        proj->n_out   = ne[1];
        proj->is_down = what.compare(0, 8, "ffn_down") == 0;
    }
    if (proj->n_in != ne[0] || proj->n_out != ne[1] || layer->n_expert != (uint32_t) ne[2]) {
        fail(HOBBIT_ERR_FORMAT,
             part.path + ": the shape of " + full + " does not agree with the other experts of its block");
    }
    tensor_source & src = proj->source[is_low ? 1 : 0];
    if (src.type >= 0) {
        fail(HOBBIT_ERR_FORMAT, part.path + ": tensor " + full + " occurs twice");
    }
    src = { (int32_t) type, part.file_id, offset, ggml_row_size(type, ne[0]), bytes / (uint64_t) ne[2] };
    return true;
}

}  // namespace hobbit
