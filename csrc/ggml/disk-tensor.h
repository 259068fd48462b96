// A tensor whose data stays on disk: `extra` of its ggml tensor.
#pragma once

#include "../engine/session.h"

#include "ggml.h"

#include <memory>

// upstream, private
#include "traits.h"

namespace hobbit {

class expert_tensor;

class disk_tensor : public ggml::cpu::tensor_traits {
  public:
    explicit disk_tensor(std::shared_ptr<session> owner) : owner_(std::move(owner)) {}

    session & owner() const { return *owner_; }

    // Where it begins in its file.
    virtual const tensor_source & source() const = 0;

    // Whether `op`, whose source number `where` this is (-1: a view of it), is one that works without the data in memory.
    virtual bool computes(const ggml_tensor * op, int where) const = 0;

    // `op` is none: the session cannot start, or fails.
    virtual void refuse(const ggml_tensor * op) = 0;

    virtual expert_tensor * expert() { return nullptr; }

    // Whether this is what `op` works on, and in a way that works. If not, in a graph that came after the session was started (an
    // adapter, another kind of context), thread 0 refuses it, and its result is zero.
    bool takes(const ggml_tensor * op) const;
    bool takes_or_refuses(int thread, ggml_tensor * op);

  private:
    std::shared_ptr<session> owner_;
};

// NULL when the tensor is not ours.
disk_tensor * find_disk_tensor(const ggml_tensor * tensor);

}  // namespace hobbit
