#include "input-statistics.h"

namespace hobbit {

void input_statistics::enable(const expert_index & index, bool on) {
    entries_.clear();
    if (!on) {
        return;
    }
    std::vector<std::vector<entry>> made;
    for (const moe_layer & layer : index.layers()) {
        made.emplace_back();
        for (const projection & p : layer.projections) {
            made.back().push_back({ std::vector<float>(layer.n_expert * p.n_in), std::vector<uint64_t>(layer.n_expert) });
        }
    }
    entries_ = std::move(made);
}

void input_statistics::add(uint32_t layer, uint32_t part, const layer_pass & pass, const void * x, int64_t n_slots,
                           size_t slot_stride, size_t token_stride) {
    entry &      e    = entries_[layer][part];
    const size_t n_in = e.sums.size() / e.counts.size();
    for (const pass_item & item : pass.items()) {
        float * sums = e.sums.data() + item.expert * n_in;
        e.counts[item.expert] += item.n_rows;
        for (uint32_t r = item.first_row; r < item.first_row + item.n_rows; ++r) {
            const pass_row at = pass.rows()[r];
            const auto *   row =
                (const float *) ((const char *) x + at.slot % n_slots * slot_stride + at.token * token_stride);
            for (size_t j = 0; j < n_in; ++j) {
                sums[j] += row[j] * row[j];
            }
        }
    }
}

}  // namespace hobbit
