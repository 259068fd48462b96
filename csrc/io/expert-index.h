// Where every expert's bytes are: GGUF header(s) -> extent per layer, expert, projection and precision.
//
// Tensors are known by name and shape, not by architecture: a routed expert tensor is three-dimensional, [n_in, n_out, n_expert], and
// called `blk.<N>.<projection>_exps.weight` (or `_chexps`). Its low-precision copy is called `hobbit.low.<that name>`, in the
// same file or in a sidecar: a GGUF of architecture `hobbit-sidecar` with nothing but these copies, all of them, and the
// fingerprint of the model it was made for.
#pragma once

#include "file.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace hobbit {

enum class precision : uint8_t { high = 0, low = 1 };
constexpr int N_PRECISION = 2;

constexpr int MAX_PROJECTIONS = 4;

extern const char * const LOW_PREFIX;            // "hobbit.low."
extern const char * const SIDECAR_ARCHITECTURE;  // of a sidecar, so that no program takes it for a model
extern const char * const FINGERPRINT_KEY;       // of the metadata of a sidecar

// One expert tensor at one precision.
struct tensor_source {
    int32_t  type      = -1;  // ggml_type; -1: there is none
    uint16_t file      = 0;
    uint64_t offset    = 0;  // of expert 0, from the start of the file
    uint64_t row_bytes = 0;
    uint64_t slice     = 0;  // bytes of one expert

    extent expert(uint32_t e) const { return { file, offset + e * slice, slice }; }
};

// gate, up, down or fused gate_up.
struct projection {
    std::string   name;  // of the tensor
    int64_t       n_in    = 0;
    int64_t       n_out   = 0;
    bool          is_down = false;  // needed last
    tensor_source source[N_PRECISION];
    uint64_t      slot_offset[N_PRECISION] = { 0, 0 };  // where it lies in a slot
    uint64_t      slot_bytes[N_PRECISION]  = { 0, 0 };  // room for the aligned range around the largest slice
};

// The second set of experts of a block (`_chexps`), by the name of a tensor.
bool is_chunked(const std::string & name);

struct moe_layer {
    uint32_t                block    = 0;  // N of blk.N
    uint32_t                n_expert = 0;
    uint32_t                n_used   = 0;  // of them by a token
    std::vector<projection> projections;

    bool     chunked() const;
    uint64_t expert_bytes(precision p) const;  // to read, without padding
    uint64_t slot_bytes(precision p) const;    // with padding
};

// A matrix of which a token needs one row: token embeddings that are not the output matrix as well.
struct embedding_table {
    std::string   name;
    int64_t       n_in   = 0;  // of a row
    int64_t       n_rows = 0;
    tensor_source source;  // slice: a row
};

class expert_index {
  public:
    // Opens the GGUF and, when it is the first of a split, its other parts. `low_path`: a sidecar, "" for none; one that is not whole or
    // belongs to another model is refused. Throws HOBBIT_ERR_FILE, _FORMAT, _NOT_MOE, _UNSUPPORTED, _SIDECAR.
    expert_index(const std::string & path, const std::string & low_path, bool direct);

    // Experts that are not there: `n_layer` layers alike, one projection each. bytes_low 0: no low copies. Throws
    // HOBBIT_ERR_INVALID_ARGUMENT.
    expert_index(uint32_t n_layer, uint32_t n_expert, uint32_t n_expert_used, uint64_t bytes_high, uint64_t bytes_low);

    const std::string & path() const { return path_; }

    const std::vector<moe_layer> & layers() const { return layers_; }

    const file & source(uint16_t i) const { return *files_[i]; }

    // {layer, projection} of a tensor, {-1, -1} when it is not a routed expert.
    std::pair<int, int> find(const std::string & tensor_name) const;

    // A regular expression (ECMAScript) that matches all expert tensors and nothing else of the model.
    std::string tensor_pattern() const;

    // Has no name where there is none that could stay on disk.
    const embedding_table & embeddings() const { return embeddings_; }

    uint32_t n_block = 0;  // with those for multi-token prediction
    uint32_t n_nextn = 0;  // for multi-token prediction: the last ones, which are not run, nor loaded

    bool is_nextn(uint32_t block) const { return block < n_block && block + n_nextn >= n_block; }

    uint32_t n_expert                 = 0;  // most of a layer
    uint32_t n_expert_used            = 0;  // most of a layer
    uint32_t n_expert_said            = 0;  // of a layer, by the metadata, which llama.cpp goes by
    uint32_t n_group                  = 0;  // expert groups (DeepSeek), 0: none
    uint32_t n_group_used             = 0;
    bool     has_low                  = false;  // complete
    uint64_t bytes_dense              = 0;
    uint64_t bytes_parsed             = 0;  // about what the metadata of the first part takes while llama.cpp loads it
    uint64_t bytes_total[N_PRECISION] = { 0, 0 };
    uint64_t max_expert[N_PRECISION]  = { 0, 0 };  // bytes
    uint64_t max_slot[N_PRECISION]    = { 0, 0 };
    uint64_t max_segment              = 0;  // largest slot_bytes of a projection at either precision

    std::vector<uint32_t> layer_experts() const;  // n_expert of each layer

    bool     direct() const;
    uint32_t alignment() const;
    void     drop_page_cache() const;

  private:
    struct header;

    void add_embeddings(const header & part, int64_t i);
    void read_model(const std::string & path, bool direct);
    void read_sidecar(const std::string & path, bool direct);
    void for_each_part(const std::string & path, bool direct, const std::function<void(const header &, uint32_t no)> & body);
    bool add_tensor(const header & part, int64_t i, const std::string & name, bool is_low);
    void check_layers();
    void lay_out_slots();

    std::string                        path_;
    std::vector<std::unique_ptr<file>> files_;
    std::vector<moe_layer>             layers_;
    std::vector<uint32_t>              used_;  // moe_layer::n_used of each block; empty: all the same
    embedding_table                    embeddings_;
};

}  // namespace hobbit
