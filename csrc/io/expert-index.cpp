#include "expert-index.h"

#include "../base/error.h"

#include <algorithm>
#include <cinttypes>
#include <regex>
#include <set>

namespace hobbit {

const char * const LOW_PREFIX           = "hobbit.low.";
const char * const SIDECAR_ARCHITECTURE = "hobbit-sidecar";
const char * const FINGERPRINT_KEY      = "hobbit.sidecar.fingerprint";

bool is_chunked(const std::string & name) { return name.find("_chexps") != std::string::npos; }

bool moe_layer::chunked() const { return is_chunked(projections[0].name); }

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

std::vector<uint32_t> expert_index::layer_experts() const {
    std::vector<uint32_t> out;
    for (const moe_layer & layer : layers_) {
        out.push_back(layer.n_expert);
    }
    return out;
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
        n_expert     = std::max(n_expert, layer.n_expert);
        layer.n_used = layer.block < used_.size() && used_[layer.block] > 0 ? used_[layer.block] : n_expert_used;
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
                    const uint64_t span = f.around(x.offset, x.bytes).bytes;
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
