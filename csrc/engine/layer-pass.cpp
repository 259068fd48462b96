#include "layer-pass.h"

#include <algorithm>

namespace hobbit {

using policy::action;
using policy::need;

void layer_pass::release() {
    if (!wants_.empty()) {
        store_.release(wants_);
        wants_.clear();
    }
    items_.clear();
    rows_.clear();
    skipped_.clear();
    uses_[0] = uses_[1] = false;
    key                 = nullptr;
    parts_done          = 0;
}

void layer_pass::build(uint32_t layer, const selections & sel, const policy::serving & how,
                       policy::threshold_profile * profile, float * out_weights) {
    release();
    layer_ = layer;
    assess(sel, how, profile);
    gather_wants(sel);
    store_.observe(layer, sel.ids, sel.ids_stride, sel.k, sel.n_tokens);
    if (layer == 0) {
        store_.begin_batch(sel.n_tokens);
    }
    store_.acquire(layer, how.rule, wants_);
    n_loads_ = (uint32_t) std::count_if(wants_.begin(), wants_.end(), [](const expert_want & w) {
        return w.ahead || w.action == action::load_high || w.action == action::load_low;
    });
    lay_out_items();
    place_rows(sel, how, out_weights);
    reset_progress();
}

static size_t id_of(const layer_pass::selections & sel, size_t s) {
    return (size_t) sel.ids[(s / sel.k) * sel.ids_stride + s % sel.k];
}

// What each selection needs.
void layer_pass::assess(const selections & sel, const policy::serving & how, policy::threshold_profile * profile) {
    const size_t n_sel = (size_t) sel.n_tokens * sel.k;
    needs_.assign(n_sel, need::high);
    split_ = false;
    if (sel.weights == nullptr || !how.by_weight(sel.k)) {
        return;
    }
    split_ = how.rule == policy::precision_rule::weight;
    scores_.resize(sel.k);
    for (uint32_t i = 0; i < sel.n_tokens; ++i) {
        policy::assess(sel.weights + i * sel.weights_stride, sel.k, layer_, how, &needs_[(size_t) i * sel.k],
                       scores_.data());
        if (profile != nullptr) {
            profile->add(scores_.data(), sel.k);
        }
    }
    if (!how.by_popularity(sel.n_tokens)) {
        return;
    }
    const uint32_t n_expert = index_.layers()[layer_].n_expert;
    popularity_.assign(n_expert, 0);
    by_expert_.resize(n_expert);
    for (size_t s = 0; s < n_sel; ++s) {
        popularity_[id_of(sel, s)] += needs_[s] != need::never;
    }
    policy::classify_popularity(popularity_.data(), n_expert, how.prefill_low, by_expert_.data());
    for (size_t s = 0; s < n_sel; ++s) {
        const need popular = by_expert_[id_of(sel, s)];
        // By `demand` popularity alone decides; by `miss` it only takes away.
        needs_[s] = needs_[s] == need::never                     ? need::never
                    : how.rule == policy::precision_rule::demand ? popular
                                                                 : std::min(needs_[s], popular);
    }
}

// The want that a selection belongs to.
int32_t & layer_pass::want_of(const selections & sel, size_t s) {
    const need kind = split_ || needs_[s] == need::never ? needs_[s] : need::high;
    return want_of_[id_of(sel, s) * policy::N_NEED + (size_t) kind];
}

// One want per expert, and one for the tokens that leave it out; by the weight rule one per expert and need, since there the cache
// may not decide.
void layer_pass::gather_wants(const selections & sel) {
    want_of_.assign((size_t) index_.layers()[layer_].n_expert * policy::N_NEED, -1);
    for (size_t s = 0; s < needs_.size(); ++s) {
        int32_t & at = want_of(sel, s);
        if (at < 0) {
            at = (int32_t) wants_.size();
            expert_want w;
            w.expert = (uint16_t) id_of(sel, s);
            w.need   = needs_[s];
            w.count  = 0;
            wants_.push_back(w);
        }
        expert_want & w = wants_[(size_t) at];
        w.need          = std::max(w.need, needs_[s]);
        w.count++;
    }
}

// Items: what is there, what comes, what has to be streamed.
void layer_pass::lay_out_items() {
    item_of_.assign(wants_.size(), NO_ITEM);
    const auto rank = [](const expert_want & w) {
        return w.entry == nullptr ? 2 : w.action == action::use_high || w.action == action::use_low ? 0 : 1;
    };
    uint32_t first_row = 0;
    for (int r = 0; r < 3; ++r) {
        for (size_t i = 0; i < wants_.size(); ++i) {
            const expert_want & w = wants_[i];
            if (w.action == action::skip || rank(w) != r) {
                continue;
            }
            pass_item item;
            item.expert    = w.expert;
            item.prec      = w.action == action::use_low || w.action == action::load_low ? precision::low : precision::high;
            item.entry     = w.entry;
            item.first_row = first_row;
            item.n_rows    = 0;
            first_row += w.count;
            uses_[(int) item.prec] = true;
            item_of_[i]            = (uint32_t) items_.size();
            items_.push_back(item);
        }
    }
    rows_.resize(first_row);
    streaming_ = std::any_of(items_.begin(), items_.end(), [](const pass_item & i) { return i.entry == nullptr; });
}

// The rows of each item, the weights to compute with, and what was served how.
void layer_pass::place_rows(const selections & sel, const policy::serving & how, float * out_weights) {
    hobbit_counts masses = {};
    for (uint32_t token = 0; token < sel.n_tokens; ++token) {
        const float * weights = sel.weights == nullptr ? nullptr : sel.weights + token * sel.weights_stride;
        float         sum = 0.0f, low = 0.0f, skipped = 0.0f, squares_asked = 0.0f, squares_low = 0.0f;
        for (uint32_t j = 0; j < sel.k; ++j) {
            const size_t   s    = (size_t) token * sel.k + j;
            const uint32_t item = item_of_[(size_t) want_of(sel, s)];
            const float    w    = weights == nullptr ? 0.0f : weights[j];
            sum += w;
            const float square = needs_[s] == need::low ? w * w : 0.0f;
            squares_asked += square;
            if (item == NO_ITEM) {
                skipped_.push_back({ (int32_t) j, (int32_t) token });
                skipped += w;
            } else {
                pass_item & it                    = items_[item];
                rows_[it.first_row + it.n_rows++] = { (int32_t) j, (int32_t) token };
                low += it.prec == precision::low ? w : 0.0f;
                squares_low += it.prec == precision::low ? square : 0.0f;
            }
            if (out_weights != nullptr) {
                out_weights[s] = item == NO_ITEM ? 0.0f : w;
            }
        }
        if (!(sum > 0.0f)) {
            continue;
        }
        masses.mass_total += 1.0;
        masses.mass_low += low / sum;
        masses.mass_skipped += skipped / sum;
        if (how.sensitivity) {
            const float scale = (*how.sensitivity)[layer_] / sum;
            masses.cost_asked += squares_asked * scale * scale;
            masses.cost_low += squares_low * scale * scale;
        }
        // What an expert makes of a scaled input is not the scaled output, so gains are left as they are.
        if (out_weights != nullptr && how.renormalize && !sel.gains && skipped > 0.0f && sum > skipped) {
            for (uint32_t j = 0; j < sel.k; ++j) {
                out_weights[(size_t) token * sel.k + j] *= sum / (sum - skipped);
            }
        }
    }
    store_.add_counts(layer_, masses);
}

void layer_pass::reset_progress() {
    const size_t room = index_.layers()[layer_].projections.size() * items_.size();
    if (room > progress_room_) {
        progress_.reset(new progress[room]);
        progress_room_ = room;
    }
    for (size_t i = 0; i < room; ++i) {
        progress_[i].next.store(0, std::memory_order_relaxed);
        progress_[i].finished.store(0, std::memory_order_relaxed);
        progress_[i].stream.store(nullptr, std::memory_order_relaxed);
    }
}

const std::byte * layer_pass::slice(uint32_t part, size_t i) {
    const pass_item & item = items_[i];
    if (item.entry != nullptr) {
        return expert_store::ready(*item.entry, part) ? store_.slice(*item.entry, part) : nullptr;
    }
    const stream_slot * slot = at(part, i).stream.load(std::memory_order_acquire);
    return slot != nullptr && slot->ready.load(std::memory_order_acquire) ? slot->data.load(std::memory_order_relaxed)
                                                                          : nullptr;
}

void layer_pass::begin_streams(uint32_t part) {
    if (!streaming_) {
        return;
    }
    std::lock_guard<std::mutex> lock(stream_mutex_);
    stream_queue_.clear();
    for (size_t i = items_.size(); i > 0; --i) {
        if (items_[i - 1].entry == nullptr) {
            stream_queue_.push_back((uint32_t) (i - 1));
        }
    }
    for (auto & slot : store_.stream_slots()) {
        stream_next(part, slot.get());
    }
}

void layer_pass::stream_next(uint32_t part, stream_slot * slot) {
    if (stream_queue_.empty()) {
        return;
    }
    const uint32_t i = stream_queue_.back();
    stream_queue_.pop_back();
    slot->ready.store(false, std::memory_order_relaxed);
    at(part, i).stream.store(slot, std::memory_order_release);
    store_.stream(layer_, items_[i].expert, items_[i].prec, part, *slot);
}

void layer_pass::item_done(uint32_t part, size_t i) {
    stream_slot * slot = at(part, i).stream.load(std::memory_order_relaxed);
    if (slot != nullptr) {
        std::lock_guard<std::mutex> lock(stream_mutex_);
        stream_next(part, slot);
    }
}

}  // namespace hobbit
