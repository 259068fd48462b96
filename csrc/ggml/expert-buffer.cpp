#include "expert-buffer.h"

#include "../base/error.h"
#include "hobbit-hooks.h"
#include "route.h"

#include "llama.h"

// upstream, private
#include "ggml-backend-impl.h"

#include <array>
#include <cstring>
#include <mutex>
#include <vector>

namespace hobbit {

namespace {

thread_local std::shared_ptr<session> bound_session;

struct expert_buffer {
    std::shared_ptr<session>                    owner;
    address_range                               addresses;
    std::vector<std::unique_ptr<expert_tensor>> tensors;
};

class extra_buffers : public ggml::cpu::extra_buffer_type {
  public:
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        // While a model is loaded llama.cpp probes every extra buffer type with empty buffers, for every tensor: those
        // are not for us.
        return op->op == GGML_OP_MUL_MAT_ID && find_expert_tensor(op->src[0]) != nullptr &&
               op->src[1]->type == GGML_TYPE_F32;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        return op->op == GGML_OP_MUL_MAT_ID ? find_expert_tensor(op->src[0]) : nullptr;
    }
};

void free_buffer(ggml_backend_buffer_t buffer) { delete (expert_buffer *) buffer->context; }

void * get_base(ggml_backend_buffer_t buffer) { return ((expert_buffer *) buffer->context)->addresses.data(); }

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    auto *     self  = (expert_buffer *) buffer->context;
    const auto where = self->owner->index().find(tensor->name);
    if (where.first < 0) {
        return GGML_STATUS_FAILED;
    }
    self->tensors.push_back(std::make_unique<expert_tensor>(self->owner, (uint32_t) where.first, (uint32_t) where.second));
    tensor->extra = self->tensors.back().get();
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {
    // Nothing is kept: the file has it. (The patched loader does not even read it.)
}

// For whoever wants to look at a weight: from the file.
void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    auto *     self  = (expert_buffer *) buffer->context;
    const auto where = self->owner->index().find(tensor->name);
    try {
        const auto & source =
            self->owner->index().layers()[(size_t) where.first].projections[(size_t) where.second].source[0];
        const file & f     = self->owner->index().source(source.file);
        const auto   begin = f.aligned_begin(source.offset + offset);
        const auto   end   = f.aligned_end(source.offset + offset + size);
        region       staging(end - begin, false);
        f.read(staging.data(), begin, end - begin, source.offset + offset + size - begin);
        memcpy(data, staging.data() + (source.offset + offset - begin), size);
    } catch (...) {
        self->owner->record_failure(std::current_exception());
        memset(data, 0, size);
    }
}

void clear(ggml_backend_buffer_t, uint8_t) {}

const char * get_name(ggml_backend_buffer_type_t) { return "HOBBIT"; }

size_t get_alignment(ggml_backend_buffer_type_t) { return 64; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    if (!bound_session) {
        return nullptr;
    }
    try {
        auto self                         = std::make_unique<expert_buffer>();
        self->owner                       = bound_session;
        self->addresses                   = address_range(size);
        const ggml_backend_buffer_i iface = {
            free_buffer, get_base, init_tensor, nullptr, set_tensor, get_tensor, nullptr, nullptr, nullptr, clear, nullptr,
        };
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

bool owns(const ggml_tensor * tensor) { return find_expert_tensor(tensor) != nullptr; }

}  // namespace

expert_tensor * find_expert_tensor(const ggml_tensor * tensor) {
    if (tensor == nullptr || tensor->buffer == nullptr || tensor->buffer->buft != expert_buffer_type()) {
        return nullptr;
    }
    return (expert_tensor *) tensor->extra;
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
    owner_(std::move(owner)), layer_(layer), part_(part) {
    const projection & p = owner_->index().layers()[layer].projections[part];
    repacked_            = find_repack_kernel(p.source[0].type, p.n_in, p.n_out);
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

void bind_thread(std::shared_ptr<session> owner) { bound_session = std::move(owner); }

const void * buft_overrides(session & owner) {
    if (!owner.overrides) {
        owner.overrides = std::shared_ptr<llama_model_tensor_buft_override[]>(new llama_model_tensor_buft_override[2] {
            { owner.tensor_pattern().c_str(), expert_buffer_type() }, { nullptr, nullptr } });
    }
    return owner.overrides.get();
}

}  // namespace hobbit
