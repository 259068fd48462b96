#include "expert-buffer.h"

#include "../base/error.h"
#include "embedding-rows.h"
#include "hobbit-hooks.h"
#include "route.h"

#include "llama.h"

// upstream, private
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <array>
#include <cstring>
#include <mutex>
#include <vector>

namespace hobbit {

namespace {

thread_local std::shared_ptr<session> bound_session;
// Of the load that is running: the buffer that was seen last, since tensors of a buffer come one after the other.
thread_local ggml_backend_buffer_t last_buffer = nullptr;

struct expert_buffer {
    std::shared_ptr<session>                  owner;
    address_range                             addresses;
    std::vector<std::unique_ptr<disk_tensor>> tensors;
};

// The tensor of ours that `op` reads or writes, straight or through a view; `where`: its number among the sources.
disk_tensor * find_operand(const ggml_tensor * op, int * where) {
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = op->src[i];
        if (src != nullptr) {
            disk_tensor * found = find_disk_tensor(src->view_src != nullptr ? src->view_src : src);
            if (found != nullptr) {
                *where = src->view_src != nullptr ? -1 : i;
                return found;
            }
        }
    }
    *where = -1;
    return op->view_src != nullptr ? find_disk_tensor(op->view_src) : nullptr;
}

bool is_layout(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

class extra_buffers : public ggml::cpu::extra_buffer_type {
  public:
    // Asked when a graph is planned, long before it runs: the moment to find out what cannot be offloaded. The answer is yes all
    // the same, since ggml ends the process when nobody supports an op; the session then fails in start(), or at the op.
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        int           where = -1;
        disk_tensor * found = find_operand(op, &where);
        if (found == nullptr) {
            // While a model is loaded llama.cpp probes every extra buffer type with empty buffers, for every tensor: those
            // are not for us.
            return false;
        }
        if (!found->computes(op, where)) {
            found->refuse(op);
        } else if (found->expert() != nullptr && op->src[1]->op == GGML_OP_MUL &&
                   (is_route(op->src[1]->src[0]) || is_route(op->src[1]->src[1]))) {
            found->expert()->set_weights_are_gains();
        }
        return true;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        int where = -1;
        return is_layout(op->op) ? nullptr : find_operand(op, &where);
    }
};

void free_buffer(ggml_backend_buffer_t buffer) {
    auto * self              = (expert_buffer *) buffer->context;
    self->owner->has_experts = false;
    delete self;
}

void * get_base(ggml_backend_buffer_t buffer) { return ((expert_buffer *) buffer->context)->addresses.data(); }

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    if (tensor->view_src != nullptr) {
        return GGML_STATUS_SUCCESS;
    }
    auto *     self  = (expert_buffer *) buffer->context;
    const auto where = self->owner->index().find(tensor->name);
    try {
        if (where.first >= 0) {
            self->tensors.push_back(
                std::make_unique<expert_tensor>(self->owner, (uint32_t) where.first, (uint32_t) where.second));
        } else if (self->owner->index().embeddings().name == tensor->name) {
            self->tensors.push_back(std::make_unique<embedding_rows>(self->owner, self->owner->index().embeddings()));
        } else {
            return GGML_STATUS_FAILED;
        }
    } catch (...) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    tensor->extra = self->tensors.back().get();
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {
    // Nothing is kept: the file has it. (The patched loader does not even read it.)
}

// For whoever wants to look at a weight: from the file.
void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    auto * self = (expert_buffer *) buffer->context;
    try {
        const ggml_tensor *   whole  = tensor->view_src != nullptr ? tensor->view_src : tensor;
        const tensor_source & source = find_disk_tensor(whole)->source();
        region                staging;
        memcpy(data,
               self->owner->index().source(source.file).read_any(source.offset + tensor->view_offs + offset, size, staging),
               size);
    } catch (...) {
        self->owner->record_failure(std::current_exception());
        memset(data, 0, size);
    }
}

void clear(ggml_backend_buffer_t, uint8_t) {}

const char * get_name(ggml_backend_buffer_type_t) { return "HOBBIT"; }

size_t get_alignment(ggml_backend_buffer_type_t) { return 64; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    if (!bound_session || bound_session->has_experts) {
        // Not for the model's experts: a LoRA adapter wants to lie where the tensor lies that it belongs to.
        return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    }
    try {
        auto self                         = std::make_unique<expert_buffer>();
        self->owner                       = bound_session;
        self->addresses                   = address_range(size);
        const ggml_backend_buffer_i iface = {
            free_buffer, get_base, init_tensor, nullptr, set_tensor, get_tensor, nullptr, nullptr, nullptr, clear, nullptr,
        };
        bound_session->has_experts = true;
        return ggml_backend_buffer_init(buft, iface, self.release(), size);
    } catch (...) {
        return nullptr;
    }
}

ggml_backend_buffer_type_t expert_buffer_type() {
    static extra_buffers            context;
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        &context,
    };
    return &type;
}

// The other weights, all of which are read for every token, in large pages: 29.7 -> 28.7 ms a token where they are 694 MiB. Asked for
// before they are filled: moving what is there already takes seconds.
void want_large_pages(const ggml_tensor * tensor) {
    ggml_backend_buffer_t buffer = tensor->buffer;
    if (buffer == last_buffer || bound_session == nullptr || !ggml_backend_buffer_is_host(buffer)) {
        return;
    }
    last_buffer = buffer;
    prefer_large_pages(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
}

// Asked for each tensor before its data is read.
bool owns(const ggml_tensor * tensor) {
    if (find_disk_tensor(tensor) != nullptr) {
        return true;
    }
    want_large_pages(tensor);
    return false;
}

}  // namespace

disk_tensor * find_disk_tensor(const ggml_tensor * tensor) {
    if (tensor == nullptr || tensor->buffer == nullptr || tensor->buffer->buft != expert_buffer_type()) {
        return nullptr;
    }
    return (disk_tensor *) tensor->extra;
}

bool disk_tensor::takes(const ggml_tensor * op) const { return computes(op, find_disk_tensor(op->src[0]) == this ? 0 : -1); }

bool disk_tensor::takes_or_refuses(int thread, ggml_tensor * op) {
    if (takes(op)) {
        return true;
    }
    if (thread == 0) {
        if (op->view_src == nullptr) {
            memset(op->data, 0, ggml_nbytes(op));
        }
        refuse(op);
    }
    return false;
}

expert_tensor * find_expert_tensor(const ggml_tensor * tensor) {
    disk_tensor * found = find_disk_tensor(tensor);
    return found == nullptr ? nullptr : found->expert();
}

void register_expert_buffers() {
    static std::once_flag once;
    std::call_once(once, [] {
        ggml_backend_cpu_get_extra_buffer_types().push_back(expert_buffer_type());
        hobbit_hooks()->owns  = owns;
        hobbit_hooks()->route = build_route;
    });
}

expert_tensor::expert_tensor(std::shared_ptr<session> owner, uint32_t layer, uint32_t part) :
    disk_tensor(std::move(owner)), layer_(layer), part_(part) {
    const projection & p = this->owner().index().layers()[layer].projections[part];
    repacked_            = find_repack_kernel(p.source[0].type, p.n_in, p.n_out);
    tiles_               = repacked_ != nullptr ? find_repacked_tile_kernel(repacked_->type) : nullptr;
}

bool is_product(const ggml_tensor * op, int where) {
    return op->op == GGML_OP_MUL_MAT_ID && where == 0 && op->src[1]->type == GGML_TYPE_F32 &&
           op->src[2]->type == GGML_TYPE_I32 && op->src[2]->nb[0] == sizeof(int32_t) && op->src[0]->ne[3] == 1;
}

const tensor_source & expert_tensor::source() const { return owner().index().layers()[layer_].projections[part_].source[0]; }

void expert_tensor::refuse(const ggml_tensor * op) {
    const projection & p = owner().index().layers()[layer_].projections[part_];
    owner().refuse(
        format("%s: this architecture uses the expert tensor %s in %s (%s), not in MUL_MAT_ID alone, so its experts "
               "cannot stay on disk; load it with offload=None",
               owner().index().path().c_str(), p.name.c_str(), ggml_op_name(op->op), op->name));
}

void check_kernels(const expert_index & index) {
    for (const moe_layer & layer : index.layers()) {
        for (const projection & p : layer.projections) {
            for (const tensor_source & source : p.source) {
                if (source.type >= 0 && ggml_get_type_traits_cpu((ggml_type) source.type)->vec_dot == nullptr) {
                    fail(HOBBIT_ERR_UNSUPPORTED,
                         format("%s: experts of %s in type %s cannot be multiplied", index.path().c_str(), p.name.c_str(),
                                ggml_type_name((ggml_type) source.type)));
                }
            }
        }
    }
}

void arrange_repacking(session & owner) {
    const auto & layers = owner.index().layers();
    // By layer and part; most models need none.
    std::vector<std::array<const repack_kernel *, MAX_PROJECTIONS>> kernels(layers.size());
    bool                                                            any = false;
    for (size_t l = 0; l < layers.size(); ++l) {
        kernels[l] = {};
        for (size_t i = 0; i < layers[l].projections.size(); ++i) {
            const projection & p = layers[l].projections[i];
            kernels[l][i]        = find_repack_kernel(p.source[0].type, p.n_in, p.n_out);
            any                  = any || kernels[l][i] != nullptr;
        }
    }
    if (!any) {
        return;
    }
    owner.set_arrival_hook([&layers, kernels](uint32_t layer, uint32_t part, precision p, std::byte * slice) {
        const repack_kernel * kernel = kernels[layer][part];
        if (p == precision::high && kernel != nullptr) {
            repack_slice(*kernel, layers[layer].projections[part].n_in, layers[layer].projections[part].n_out, slice);
        }
    });
}

void bind_thread(std::shared_ptr<session> owner) {
    bound_session = std::move(owner);
    last_buffer   = nullptr;
}

const void * buft_overrides(session & owner) {
    if (!owner.overrides) {
        const bool rows = owner.embeddings_on_disk && !owner.index().embeddings().name.empty();
        owner.overrides = std::shared_ptr<llama_model_tensor_buft_override[]>(
            new llama_model_tensor_buft_override[3] { { owner.tensor_pattern().c_str(), expert_buffer_type() },
                                                      { rows ? "^token_embd\\.weight$" : nullptr, expert_buffer_type() },
                                                      { nullptr, nullptr } });
    }
    return owner.overrides.get();
}

}  // namespace hobbit
