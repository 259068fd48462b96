#include "embedding-rows.h"

#include "../base/error.h"

#include <algorithm>
#include <cstring>

// upstream, private
#include "ggml-cpu-impl.h"

namespace hobbit {

row_cache::row_cache(uint64_t row_bytes, uint64_t n_rows) :
    row_bytes_(row_bytes), held_(bytes(row_bytes, n_rows) / row_bytes, -1), rows_(bytes(row_bytes, n_rows), true) {}

uint64_t row_cache::bytes(uint64_t row_bytes, uint64_t n_rows) {
    return std::clamp<uint64_t>(BYTES / row_bytes, 1, n_rows) * row_bytes;
}

bool row_cache::get(int64_t i, std::byte * row) const {
    const size_t                slot = (size_t) i % held_.size();
    std::lock_guard<std::mutex> lock(mutex_);
    if (held_[slot] != i) {
        return false;
    }
    memcpy(row, rows_.data() + slot * row_bytes_, row_bytes_);
    return true;
}

void row_cache::put(int64_t i, const std::byte * row) {
    const size_t                slot = (size_t) i % held_.size();
    std::lock_guard<std::mutex> lock(mutex_);
    held_[slot] = i;
    memcpy(rows_.data() + slot * row_bytes_, row, row_bytes_);
}

embedding_rows::embedding_rows(std::shared_ptr<session> owner, const embedding_table & table) :
    disk_tensor(std::move(owner)), table_(table), cache_(table.source.row_bytes, (uint64_t) table.n_rows) {}

bool embedding_rows::computes(const ggml_tensor * op, int where) const {
    return op->op == GGML_OP_GET_ROWS && where == 0 && op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32 &&
           op->src[0]->ne[2] == 1 && op->src[0]->ne[3] == 1;
}

void embedding_rows::refuse(const ggml_tensor * op) {
    owner().refuse(
        format("%s: this architecture uses %s in %s (%s), not by rows alone, so it cannot stay on disk; load the model with "
               "OffloadParams(embeddings_on_disk=False)",
               owner().index().path().c_str(), table_.name.c_str(), ggml_op_name(op->op), op->name));
}

bool embedding_rows::work_size(int, const ggml_tensor * op, size_t & size) {
    size = 0;
    return takes(op);
}

// In memory of this thread, until its next call.
const std::byte * embedding_rows::read_row(int64_t i) {
    thread_local std::vector<std::byte> kept;
    thread_local region                 staging;
    const tensor_source &               source = table_.source;
    kept.resize(source.row_bytes);
    if (cache_.get(i, kept.data())) {
        return kept.data();
    }
    const extent      at  = source.expert((uint32_t) i);
    const std::byte * row = owner().index().source(source.file).read_any(at.offset, at.bytes, staging);
    cache_.put(i, row);
    return row;
}

bool embedding_rows::compute_forward(ggml_compute_params * params, ggml_tensor * op) {
    if (!takes_or_refuses(params->ith, op)) {
        return true;
    }
    const ggml_tensor * ids     = op->src[1];
    const auto          n_in    = (size_t) table_.n_in;
    const auto          convert = ggml_get_type_traits((ggml_type) table_.source.type)->to_float;
    for (int64_t i = params->ith; i < ggml_nelements(ids); i += params->nth) {
        const auto   a  = (size_t) (i % ids->ne[0]);
        const auto   b  = (size_t) (i / ids->ne[0] % ids->ne[1]);
        const auto   c  = (size_t) (i / (ids->ne[0] * ids->ne[1]));
        const auto   id = *(const int32_t *) ((const char *) ids->data + a * ids->nb[0] + b * ids->nb[1] + c * ids->nb[2]);
        auto * const to = (float *) ((char *) op->data + a * op->nb[1] + b * op->nb[2] + c * op->nb[3]);
        if (owner().failed()) {  // a prompt has thousands of rows, and nobody waits for them any more
            memset(to, 0, n_in * sizeof(float));
            continue;
        }
        try {
            if (id < 0 || id >= table_.n_rows) {
                fail(HOBBIT_ERR_INVALID_ARGUMENT, format("there is no row %d of %s", (int) id, table_.name.c_str()));
            }
            const std::byte * row = read_row(id);
            if (convert != nullptr) {
                convert(row, to, (int64_t) n_in);
            } else {  // F32
                memcpy(to, row, n_in * sizeof(float));
            }
        } catch (...) {
            owner().record_failure(std::current_exception());
            memset(to, 0, n_in * sizeof(float));
        }
    }
    return true;
}

}  // namespace hobbit
