// The seam to ggml for token embeddings: a matrix of hundreds of megabytes of which a token needs one row, read when it is asked for.
#pragma once

#include "disk-tensor.h"

#include <mutex>
#include <vector>

namespace hobbit {

// Rows that were asked for lately, as they lie in the file. Direct mapped: in the vocabularies of language models frequent tokens have
// small numbers. Any thread.
class row_cache {
  public:
    row_cache(uint64_t row_bytes, uint64_t n_rows);

    // Copies row `i` if it is there.
    bool get(int64_t i, std::byte * row) const;
    void put(int64_t i, const std::byte * row);

    static constexpr uint64_t BYTES = (uint64_t) 4 << 20;
    // What one of so many rows holds: BYTES at most, but one row.
    static uint64_t bytes(uint64_t row_bytes, uint64_t n_rows);

  private:
    mutable std::mutex   mutex_;
    uint64_t             row_bytes_;
    std::vector<int64_t> held_;  // by slot; -1: none
    region               rows_;
};

class embedding_rows : public disk_tensor {
  public:
    embedding_rows(std::shared_ptr<session> owner, const embedding_table & table);

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override;
    // A read that fails is recorded, and its row is zero.
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override;
    bool computes(const ggml_tensor * op, int where) const override;
    void refuse(const ggml_tensor * op) override;

    const tensor_source & source() const override { return table_.source; }

  private:
    const std::byte * read_row(int64_t i);

    const embedding_table & table_;
    row_cache               cache_;
};

}  // namespace hobbit
