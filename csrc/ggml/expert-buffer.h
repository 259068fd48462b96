// The seam to ggml: a buffer type for routed experts whose data stays on disk.
//
// Registered as an extra buffer type of the CPU backend, so that MUL_MAT_ID on its tensors comes to us on every compute thread
// without a patch in ggml. Any other op on them is found when the graph is planned, and the model refused (extra_buffers::supports_op).
// Tensors get addresses in a range without memory behind it: whoever reads them by another way than ours gets SIGSEGV and not
// wrong numbers.
#pragma once

#include "disk-tensor.h"
#include "repacking.h"
#include "tile.h"

#include "ggml-backend.h"

#include <atomic>
#include <memory>

namespace hobbit {

// Whether `op`, whose source number `where` is an expert tensor, is what mul-mat-id.cpp computes.
bool is_product(const ggml_tensor * op, int where);

class expert_tensor : public disk_tensor {
  public:
    expert_tensor(std::shared_ptr<session> owner, uint32_t layer, uint32_t part);

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override;
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override;

    const tensor_source & source() const override;
    bool                  computes(const ggml_tensor * op, int where) const override { return is_product(op, where); }
    void                  refuse(const ggml_tensor * op) override;

    expert_tensor * expert() override { return this; }

    uint32_t layer() const { return layer_; }

    uint32_t part() const { return part_; }

    // Of high-precision slices; NULL: they lie as in the file.
    const repack_kernel * repacked() const { return repacked_; }

    // Of repacked slices: for batches; NULL where there are none.
    const tile_kernel * repacked_tiles() const { return tiles_; }

    // Router weights are multiplied into this tensor's input, not its experts' output; learnt when the graph is planned.
    bool weights_are_gains() const { return weights_are_gains_.load(std::memory_order_relaxed); }

    void set_weights_are_gains() { weights_are_gains_.store(true, std::memory_order_relaxed); }

  private:
    uint32_t              layer_;
    uint32_t              part_;
    const repack_kernel * repacked_;
    const tile_kernel *   tiles_;
    std::atomic<bool>     weights_are_gains_ { false };
};

// Registers buffer type and hooks; once, before the first offloaded model.
void register_expert_buffers();

// Throws HOBBIT_ERR_UNSUPPORTED for experts of a type that this CPU has no product for.
void check_kernels(const expert_index & index);

// Slices that stock llama.cpp would keep repacked are repacked when they arrive (repacking.h). Before the session starts.
void arrange_repacking(session & owner);

// The session that takes the expert tensors of models loaded by this thread, or NULL.
void bind_thread(std::shared_ptr<session> owner);

// A llama_model_tensor_buft_override array that sends the session's expert tensors here.
const void * buft_overrides(session & owner);

// NULL when the tensor is not ours.
expert_tensor * find_expert_tensor(const ggml_tensor * tensor);

}  // namespace hobbit
