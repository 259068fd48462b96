// The division of the pool between high and low precision, and its size.
#include "../base/error.h"
#include "expert-store.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace hobbit {

// The border between high and low slots is looked at every so many tokens, and moves when the other side is worth so much more, so many
// times in a row: a move costs copies and fresh pages, and at the balance each look says something else (3 % of a token's time).
static constexpr uint32_t BORDER_TOKENS = 4;
static constexpr double   BORDER_CLEAR  = 1.25;
static constexpr uint32_t BORDER_SURE   = 4;

// Free slots go over to the side that the last token has read so much more for.
static constexpr uint64_t MOSTLY = 2;

// Bytes of slots that are moved while the lock is held: a pool of 64 GiB would stop for seconds otherwise.
static constexpr uint64_t AT_A_TIME = (uint64_t) 64 << 20;

// The fewest slots that can be left: a layer's k experts each, without which they would be streamed in every product; of low copies as
// many of these as there is room for beside the high ones.
uint32_t expert_store::fewest(int precision) const {
    const cache_shape & shape = cache_->shape();
    const uint32_t      k     = index_.n_expert_used;
    if (precision == 0) {
        return k;
    }
    if (!with_low_ || all_high_ || high_serves_all()) {
        return 0;
    }
    const uint64_t high = k * shape.slot_bytes[0];
    const uint64_t room = cache_->limit() > high ? (cache_->limit() - high) / shape.slot_bytes[1] : 0;
    return (uint32_t) std::min<uint64_t>({ k, shape.n_slots[1], room });
}

// A slot fewer; its pages go back to the system with those of its neighbours, by give_back_pages().
bool expert_store::take_slot(int p) {
    if (cache_->shape().n_slots[p] <= fewest(p) || !cache_->take_slot(p, now_)) {
        return false;
    }
    if (pool_.data() != nullptr) {
        std::byte *  at    = cache_->slot(p, cache_->shape().n_slots[p]);
        const auto   begin = (size_t) (at - pool_.data());
        const auto   end   = begin + cache_->shape().slot_bytes[p];
        page_range & taken = taken_[p];
        if (end != taken.begin && begin != taken.end) {
            give_back_pages();
            taken = { begin, end };
        }
        taken = { std::min(taken.begin, begin), std::max(taken.end, end) };
    }
    return true;
}

// Large pages at once: one of which a part is given back becomes small ones, and its place does not hold a large one again.
// `whole_only`: more will be taken, so what is left of the page at the border stays until then.
void expert_store::give_back_pages(bool whole_only) {
    for (int p = 0; p < N_PRECISION; ++p) {
        page_range & taken = taken_[p];
        page_range   now   = taken;
        if (whole_only && p == 0) {
            now.begin = std::min(now.end, align_up(now.begin, LARGE_PAGE));
        } else if (whole_only) {
            now.end = std::max(now.begin, align_down(now.end, LARGE_PAGE));
        }
        if (now.end > now.begin) {
            pool_.release(now.begin, now.end - now.begin);
            taken = p == 0 ? page_range { taken.begin, now.begin } : page_range { now.end, taken.end };
        }
        taken = whole_only ? taken : page_range {};
    }
}

// A slot more, its pages present. Throws HOBBIT_ERR_NO_MEMORY.
bool expert_store::add_slot(int p) {
    if (!cache_->can_add(p)) {
        return false;
    }
    if (pool_.data() != nullptr) {
        give_back_pages();
        std::byte * at = cache_->slot(p, cache_->shape().n_slots[p]);
        pool_.populate((size_t) (at - pool_.data()), cache_->shape().slot_bytes[p]);
    }
    return cache_->add_slot(p);
}

// Slots more until they are `most` bytes, or there is no room. Returns how many bytes. Throws HOBBIT_ERR_NO_MEMORY.
uint64_t expert_store::add_slots(int p, uint64_t most) {
    uint64_t added = 0;
    while (added < most && add_slot(p)) {
        added += cache_->shape().slot_bytes[p];
    }
    return added;
}

// In the middle of a token, which must not fail because the pool cannot have a page back: what there is memory for.
void expert_store::add_what_fits(int p, uint64_t most) noexcept {
    try {
        add_slots(p, most);
    } catch (...) {
        // At the next token.
    }
}

// Gives slots to the precision whose copies are worth more a byte at the margin, where they are evicted next.
void expert_store::move_border() {
    shrink_to_limit();
    const cache_shape & shape = cache_->shape();
    if (resizing_) {
        return;
    }
    // What resize() had to leave because slots were in use.
    if (all_high_) {
        try {
            fill_with_high();
        } catch (const error &) {
            // No memory to grow into: it stays as it is.
        }
        return;
    }
    restore_low_slots();
    if (border_moves_) {  // what there was no memory for
        add_what_fits(0, AT_A_TIME);
        add_what_fits(1, AT_A_TIME);
    }
    const auto nothing_free = [&](int p) { return shape.n_slots[p] > 0 && cache_->n_free(p) == 0; };
    if (!border_moves_ || high_serves_all() || !(nothing_free(0) || nothing_free(1))) {
        return;
    }
    if (!(nothing_free(0) && nothing_free(1))) {
        hand_over_free_slots(nothing_free(0) ? 0 : 1);
    }
    if (now_.token - border_seen_ < BORDER_TOKENS) {
        return;
    }
    border_seen_        = now_.token;
    const uint64_t both = shape.slot_bytes[0] + shape.slot_bytes[1];
    const uint64_t step = std::max(std::min(cache_->limit() / 128, AT_A_TIME), both);
    double         worth[2];
    for (int p = 0; p < 2; ++p) {
        const auto n = (uint32_t) (step / shape.slot_bytes[p]);
        worth[p]     = nothing_free(p) ? cache_->margin(p, n, now_) / (double) shape.slot_bytes[p] : 0.0;
    }
    int to      = worth[0] > BORDER_CLEAR * worth[1] ? 0 : worth[1] > BORDER_CLEAR * worth[0] ? 1 : -1;
    to          = to >= 0 && shape.n_slots[to] == cache_->n_experts() ? -1 : to;  // there is nothing more to hold
    border_run_ = to == border_to_ ? border_run_ + 1 : 1;
    border_to_  = to;
    if (to < 0 || border_run_ < BORDER_SURE) {
        return;
    }
    const int from  = 1 - to;
    uint64_t  freed = 0;
    while (freed + shape.slot_bytes[from] <= step && take_slot(from)) {
        freed += shape.slot_bytes[from];
    }
    give_back_pages();
    add_what_fits(to, step);
    add_what_fits(from, step);
}

// What lies empty on the other side is of use at once, where the last token filled far less of it: as many slots as a token can ask for.
// What either is worth only says who evicts, and in small steps.
void expert_store::hand_over_free_slots(int to) {
    const cache_shape & shape = cache_->shape();
    const int           from  = 1 - to;
    if (inserted_[to] == 0 || inserted_[to] < MOSTLY * inserted_[from] || shape.n_slots[from] == cache_->n_experts()) {
        return;
    }
    const uint64_t room = cache_->limit() - std::min(cache_->limit(), cache_->used_bytes());
    if (room + cache_->n_free(from) * shape.slot_bytes[from] < shape.slot_bytes[to]) {
        return;  // not one
    }
    const uint64_t cycle = shape.slot_bytes[to] * shape.n_layer * shape.k;
    const uint64_t most  = std::max(std::min(cycle, AT_A_TIME), shape.slot_bytes[to]);
    uint64_t       freed = 0;
    while (room + freed < most && cache_->n_free(from) > 0 && take_slot(from)) {
        freed += shape.slot_bytes[from];
    }
    give_back_pages();
    add_what_fits(to, most);
    add_what_fits(from, freed);
}

// Some of what is to go; true if the rest may follow at once.
bool expert_store::shrink_to_limit() {
    const cache_shape & shape = cache_->shape();
    if (cache_->used_bytes() <= cache_->limit()) {
        return false;
    }
    // In proportion: what the border was right for is right for a smaller pool, or it moves again.
    const auto     low_bytes = [&] { return (double) (shape.n_slots[1] * shape.slot_bytes[1]); };
    const double   low_share = low_bytes() / (double) cache_->used_bytes();
    const uint64_t before    = cache_->used_bytes();
    while (cache_->used_bytes() > cache_->limit()) {
        if (before - cache_->used_bytes() >= AT_A_TIME) {
            give_back_pages(true);
            return true;
        }
        const int p = low_bytes() > low_share * (double) cache_->used_bytes() && shape.n_slots[1] > fewest(1) ? 1 : 0;
        if (!take_slot(p) && !take_slot(1 - p)) {
            break;  // in use: at the next token
        }
    }
    give_back_pages();
    if (cache_->used_bytes() > cache_->limit()) {
        return false;
    }
    restore_low_slots();
    return false;
}

// Where every expert had a slot in high precision there are no low ones yet: as many as a layer needs.
void expert_store::restore_low_slots() noexcept {
    try {
        while (with_low_ && !all_high_ && cache_->shape().n_slots[1] < index_.n_expert_used &&
               (add_slot(1) || take_slot(0))) {
        }
    } catch (...) {
        // No memory for them: at the next token.
    }
    give_back_pages();
}

// Where every expert has a slot in high precision nobody asks for low copies. They go last: until then they are of use. True if there is
// more to be done.
bool expert_store::fill_with_high() {
    const cache_shape & shape = cache_->shape();
    uint64_t            moved = add_slots(0, AT_A_TIME);
    if (moved == 0 && shape.n_slots[1] > 0) {
        while (moved < AT_A_TIME && take_slot(1)) {
            moved += shape.slot_bytes[1];
        }
        give_back_pages();
        add_slots(0, AT_A_TIME);
    }
    return moved > 0;
}

void expert_store::resize(uint64_t pool_bytes) {
    if (find_eviction_rule(params_.eviction_rule)->split != slot_split::none) {
        fail(HOBBIT_ERR_UNSUPPORTED,
             "with slots of its own for each layer (layer-lru, layer-arc, fate) a pool keeps its size");
    }
    // Throws below the floor.
    const pool_plan              plan = plan_pool(index_, params_, std::min(pool_bytes, pool_max(index_, params_)));
    std::lock_guard<std::mutex>  one(resize_mutex_);
    std::unique_lock<std::mutex> lock(mutex_);
    const cache_shape &          shape  = cache_->shape();
    const uint64_t               before = cache_->limit();
    const bool                   all    = all_high_;
    const double                 low    = (double) (shape.n_slots[1] * shape.slot_bytes[1]);
    const double                 share  = low / (double) std::max<uint64_t>(cache_->used_bytes(), 1);

    const auto shrink = [&] {
        while (shrink_to_limit()) {
            step_aside(lock);
        }
    };
    const auto some_more = [&] {
        if (all_high_) {
            return fill_with_high();
        }
        const double wanted = share * (double) cache_->limit() - (double) (shape.n_slots[1] * shape.slot_bytes[1]);
        return add_slots(1, (uint64_t) std::clamp(wanted, 0.0, (double) AT_A_TIME)) > 0 || add_slots(0, AT_A_TIME) > 0 ||
               (with_low_ && add_slots(1, AT_A_TIME) > 0);
    };
    struct under_way {
        bool & flag;

        explicit under_way(bool & flag) : flag(flag) { flag = true; }

        ~under_way() { flag = false; }
    };

    const under_way mark(resizing_);
    cache_->set_limit(plan.cache_bytes());
    all_high_ = plan.all_high();
    try {
        if (cache_->limit() <= before) {
            shrink();
        } else {
            while (some_more()) {
                step_aside(lock);
            }
        }
    } catch (...) {
        cache_->set_limit(before);
        all_high_ = all;
        shrink();
        throw;
    }
}

// Whoever waits for the lock has it now: one that gives it up and takes it again at once would mostly be first.
void expert_store::step_aside(std::unique_lock<std::mutex> & lock) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    lock.lock();
}

}  // namespace hobbit
