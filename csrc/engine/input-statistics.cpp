#include "input-statistics.h"

#include "ggml.h"

#include <algorithm>

namespace hobbit {

namespace {

constexpr float    LARGEST_F16 = 65504.0f;
constexpr uint16_t NO_EXPERT   = UINT16_MAX;  // skipped

}  // namespace

void input_statistics::enable(const expert_index & index, bool on, bool rows) {
    entries_.clear();
    batches_.clear();
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
    batches_.resize(rows ? made.size() : 0);
    entries_ = std::move(made);
}

void input_statistics::begin() {
    for (batch & of : batches_) {
        of.rows.clear();
        of.selected.clear();
    }
}

const input_statistics::batch * input_statistics::find_batch(uint32_t layer, uint32_t part) const {
    return batches_.empty() || !entries_[layer][part].shared ? nullptr : &batches_[layer];
}

void input_statistics::keep(uint32_t layer, const layer_pass & pass, size_t n_in, const inputs & x) {
    batch & of    = batches_[layer];
    size_t  at    = of.rows.size();
    size_t  first = of.selected.size();
    of.k          = x.k;
    of.rows.resize(at + n_in * x.n_tokens);
    of.selected.resize(first + x.k * x.n_tokens, NO_EXPERT);
    for (int64_t token = 0; token < x.n_tokens; ++token) {
        const auto * row = (const float *) ((const char *) x.data + token * x.token_stride);
        for (size_t j = 0; j < n_in; ++j) {
            of.rows[at++] = ggml_fp32_to_fp16(std::clamp(row[j], -LARGEST_F16, LARGEST_F16));
        }
    }
    for (const pass_item & item : pass.items()) {
        for (uint32_t r = item.first_row; r < item.first_row + item.n_rows; ++r) {
            of.selected[first + pass.rows()[r].token * x.k + pass.rows()[r].slot] = item.expert;
        }
    }
}

void input_statistics::add(uint32_t layer, uint32_t part, const layer_pass & pass, const inputs & x) {
    entry &      e    = entries_[layer][part];
    const size_t n_in = e.sums.size() / e.counts.size();
    if (!batches_.empty() && x.n_slots == 1 && x.of_layer) {
        int32_t & filled_by = batches_[layer].part;
        filled_by           = filled_by < 0 ? (int32_t) part : filled_by;
        e.shared            = true;
        if (filled_by == (int32_t) part) {
            keep(layer, pass, n_in, x);
        }
    }
    for (const pass_item & item : pass.items()) {
        float * sums = e.sums.data() + item.expert * n_in;
        e.counts[item.expert] += item.n_rows;
        for (uint32_t r = item.first_row; r < item.first_row + item.n_rows; ++r) {
            const pass_row at = pass.rows()[r];
            const auto *   row =
                (const float *) ((const char *) x.data + at.slot % x.n_slots * x.slot_stride + at.token * x.token_stride);
            for (size_t j = 0; j < n_in; ++j) {
                sums[j] += row[j] * row[j];
            }
        }
    }
}

}  // namespace hobbit
