#include "expert-index.h"

#include "../base/error.h"
#include "fingerprint.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <map>
#include <regex>
#include <set>

namespace hobbit {

const char * const LOW_PREFIX           = "hobbit.low.";
const char * const SIDECAR_ARCHITECTURE = "hobbit-sidecar";
const char * const FINGERPRINT_KEY      = "hobbit.sidecar.fingerprint";

static const char * const CHUNKED = "_chexps";

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
            const size_t    n    = gguf_get_arr_n(g, id);
            const gguf_type type = gguf_get_arr_type(g, id);
            if (type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) {
                return otherwise;
            }
            const auto * v = (const uint32_t *) gguf_get_arr_data(g, id);
            return n == 0 ? otherwise : *std::max_element(v, v + n);
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

}  // namespace

bool moe_layer::chunked() const { return projections[0].name.find(CHUNKED) != std::string::npos; }

uint64_t moe_layer::expert_bytes(precision p) const {
    uint64_t n = 0;
    for (const auto & proj : projections) {
        n += proj.source[(int) p].slice;
    }
    return n;
}

uint64_t moe_layer::slot_bytes(precision p) const {
    uint64_t n = 0;
    for (const auto & proj : projections) {
        n += proj.slot_bytes[(int) p];
    }
    return n;
}

// An open header.
struct expert_index::header {
    std::string                                 path;
    uint16_t                                    file_id;
    std::unique_ptr<gguf_context, gguf_deleter> gguf;
};

expert_index::expert_index(const std::string & path, const std::string & low_path, bool direct) : path_(path) {
    read_model(path, direct);
    check_layers();
    if (!low_path.empty()) {
        try {
            read_sidecar(low_path, direct);
        } catch (const error & e) {
            // Whatever is wrong with it, it is not the model that is to be blamed.
            if (e.status() == HOBBIT_ERR_FORMAT) {
                fail(HOBBIT_ERR_SIDECAR, e.what());
            }
            throw;
        }
    }
    lay_out_slots();
    // The header came in through the page cache, with read-ahead; nothing of the file shall stay there.
    drop_page_cache();
}

expert_index::expert_index(uint32_t n_layer, uint32_t n_expert, uint32_t k, uint64_t bytes_high, uint64_t bytes_low) :
    n_block(n_layer), path_("(no file)") {
    constexpr uint64_t MAX_BYTES = (uint64_t) 1 << 40;
    if (n_layer == 0 || n_layer > 4096 || n_expert == 0 || n_expert > UINT16_MAX || k == 0 || k > n_expert ||
        bytes_high == 0 || bytes_high > MAX_BYTES || bytes_low > bytes_high) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT,
             format("no model has %u layers of %u experts, top-%u, of %" PRIu64 " and %" PRIu64 " bytes", n_layer, n_expert,
                    k, bytes_high, bytes_low));
    }
    uint64_t end = 0;
    for (uint32_t l = 0; l < n_layer; ++l) {
        moe_layer layer;
        layer.block    = l;
        layer.n_expert = n_expert;
        projection p;
        p.name    = format("blk.%u.ffn_down_exps.weight", l);
        p.n_in    = 1;
        p.n_out   = (int64_t) bytes_high;
        p.is_down = true;
        for (int i = 0; i < N_PRECISION; ++i) {
            const uint64_t bytes = i == 0 ? bytes_high : bytes_low;
            if (bytes > 0) {
                p.source[i] = { 0, 0, end, bytes, bytes };
                end += bytes * n_expert;
            }
        }
        layer.projections.push_back(p);
        layers_.push_back(layer);
    }
    files_.push_back(std::make_unique<file>(end));
    n_expert_used = k;
    check_layers();
    lay_out_slots();
}

void expert_index::read_model(const std::string & path, bool direct) {
    uint32_t n_tensors = 0;
    uint32_t expected  = 0;
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
            n_expert_used = read_u32(g, arch + ".expert_used_count", 0);
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
        }
    });
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
    const bool  ch    = what.find(CHUNKED) != std::string::npos;
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

void expert_index::check_layers() {
    if (layers_.empty()) {
        fail(HOBBIT_ERR_NOT_MOE, path_ + " has no routed experts: a dense model has nothing to offload");
    }
    // In the order in which they are run: of two sets in a block the chunked experts come second.
    std::sort(layers_.begin(), layers_.end(), [](const moe_layer & a, const moe_layer & b) {
        return a.block != b.block ? a.block < b.block : !a.chunked() && b.chunked();
    });
    has_low = true;
    for (auto & layer : layers_) {
        if (layer.projections.size() > MAX_PROJECTIONS) {
            fail(HOBBIT_ERR_UNSUPPORTED, format("block %u has %zu expert tensors; at most %d are supported", layer.block,
                                                layer.projections.size(), MAX_PROJECTIONS));
        }
        // The down projection is needed last: it is read last.
        std::stable_sort(layer.projections.begin(), layer.projections.end(),
                         [](const projection & a, const projection & b) { return a.is_down < b.is_down; });
        n_expert = std::max(n_expert, layer.n_expert);
        for (const auto & p : layer.projections) {
            if (p.source[0].type < 0) {
                fail(HOBBIT_ERR_FORMAT, path_ + " has a low-precision copy of " + p.name + " but not the tensor itself");
            }
            has_low = has_low && p.source[1].type >= 0;
        }
    }
    if (n_expert_used == 0 || n_expert_used > n_expert) {
        fail(HOBBIT_ERR_FORMAT, path_ + ": the metadata does not say how many experts a token uses (expert_used_count)");
    }
}

void expert_index::lay_out_slots() {
    for (auto & layer : layers_) {
        for (int p = 0; p < N_PRECISION; ++p) {
            uint64_t at = 0;
            for (auto & proj : layer.projections) {
                const tensor_source & src = proj.source[p];
                proj.slot_offset[p]       = at;
                if (src.type < 0) {
                    continue;
                }
                const file & f = *files_[src.file];
                for (uint32_t e = 0; e < layer.n_expert; ++e) {
                    const extent   x    = src.expert(e);
                    const uint64_t span = f.aligned_end(x.offset + x.bytes) - f.aligned_begin(x.offset);
                    proj.slot_bytes[p]  = std::max<uint64_t>(proj.slot_bytes[p], align_up(span, PAGE));
                }
                at += proj.slot_bytes[p];
                max_segment = std::max(max_segment, proj.slot_bytes[p]);
            }
            const auto prec = (precision) p;
            bytes_total[p] += layer.expert_bytes(prec) * layer.n_expert;
            max_expert[p] = std::max(max_expert[p], layer.expert_bytes(prec));
            max_slot[p]   = std::max(max_slot[p], layer.slot_bytes(prec));
        }
    }
}

std::pair<int, int> expert_index::find(const std::string & name) const {
    for (size_t l = 0; l < layers_.size(); ++l) {
        for (size_t p = 0; p < layers_[l].projections.size(); ++p) {
            if (layers_[l].projections[p].name == name) {
                return { (int) l, (int) p };
            }
        }
    }
    return { -1, -1 };
}

std::string expert_index::tensor_pattern() const {
    std::set<std::string> blocks, kinds;
    for (const auto & layer : layers_) {
        blocks.insert(std::to_string(layer.block));
        for (const auto & p : layer.projections) {
            kinds.insert(std::regex_replace(p.name.substr(p.name.find('.', 4) + 1), std::regex("\\."), "\\."));
        }
    }
    const auto any_of = [](const std::set<std::string> & names) {
        std::string out;
        for (const auto & name : names) {
            out += (out.empty() ? "(" : "|") + name;
        }
        return out + ")";
    };
    return "^blk\\." + any_of(blocks) + "\\." + any_of(kinds) + "$";
}

bool expert_index::direct() const {
    return std::all_of(files_.begin(), files_.end(), [](const auto & f) { return f->direct(); });
}

uint32_t expert_index::alignment() const {
    uint32_t n = 1;
    for (const auto & f : files_) {
        n = std::max(n, f->alignment());
    }
    return n;
}

void expert_index::drop_page_cache() const {
    for (const auto & f : files_) {
        f->drop_page_cache();
    }
}

}  // namespace hobbit
