#include "expert-store.h"

#include "../base/error.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hobbit {

// How fast use_record::high_share follows, a use each.
static constexpr float HIGH_SHARE_STEP = 0.1f;

expert_store::expert_store(const expert_index & index, const hobbit_params & params, uint64_t pool_bytes,
                           arrival_hook on_arrival, const reader_factory & make_reader) :
    index_(index), params_(params), on_arrival_(std::move(on_arrival)), counts_(index.layers().size()) {
    pool_plan plan   = plan_pool(index, params, pool_bytes);
    stream_bytes_    = plan.stream_bytes;
    with_low_        = plan.with_low;
    all_high_        = plan.all_high();
    plan.cache.bytes = plan.cache_bytes();
    std::byte * room = nullptr;
    if (make_reader) {
        no_pool_             = address_range(plan.bytes());
        room                 = no_pool_.data();
        plan.cache.simulated = true;
    } else {
        // Address space for all experts, so that the pool can grow; where that is refused, just what it takes now.
        const uint64_t most = std::max(pool_max(index, params), plan.bytes());
        try {
            pool_            = region::reserve(most);
            plan.cache.bytes = most - plan.stream_bytes;
        } catch (const error &) {
            pool_ = region::reserve(plan.bytes());
        }
        room = pool_.data();
        pool_.populate(0, plan.stream_bytes + plan.cache.n_slots[0] * plan.cache.slot_bytes[0]);
        const uint64_t low = plan.cache.n_slots[1] * plan.cache.slot_bytes[1];
        pool_.populate(plan.stream_bytes + plan.cache.bytes - low, low);
    }
    for (uint32_t i = 0; i < plan.n_stream; ++i) {
        stream_slots_.push_back(std::make_unique<stream_slot>());
        stream_slots_.back()->room = room + i * index.max_segment;
    }
    uses_.resize(counts_.size() * index.n_expert);
    loads_.resize(uses_.size());
    asked_[0].resize(counts_.size());
    asked_[1].resize(counts_.size());
    const eviction_rule & rule = *find_eviction_rule(params.eviction_rule);
    cache_                     = std::make_unique<expert_cache>(plan.cache, room + plan.stream_bytes, rule,
                                                                [this](const cache_entry & e) { count_evicted(e); });
    cache_->set_limit(plan.cache_bytes());
    // Only priorities that count the cost of an absence compare between the precisions.
    border_moves_        = with_low_ && params.fixed_split == 0 && rule.by_cost && rule.split == slot_split::none;
    now_.n_layer         = plan.cache.n_layer;
    now_.weights         = { params.w_lru, params.w_lfu, params.w_lhu, params.w_fld };
    now_.low_cost        = with_low_ ? (float) index.max_expert[1] / (float) index.max_expert[0] : 0.0f;
    now_.high_serves_low = policy::high_serves_low((policy::precision_rule) params.precision_rule);
    if (params.eviction_rule == HOBBIT_EVICT_FORESIGHT) {
        foresight_ = std::make_unique<foresight>(*cache_, plan.cache.n_layer, plan.cache.n_expert,
                                                 (float) index.n_expert_used / (float) plan.cache.n_expert, now_.low_cost,
                                                 now_.high_serves_low);
        for (uint32_t d = 0; d <= plan.cache.n_layer; ++d) {
            discount_.push_back(std::pow(FORESIGHT_GAMMA, (float) d / (float) plan.cache.n_layer));
        }
        now_.discount = discount_.data();
    }

    const auto on_end = [this](const io_request & r, io_outcome o, std::exception_ptr why) { on_read_end(r, o, why); };
    io_               = make_reader ? make_reader(params, on_end)
                                    : std::make_unique<io_pool>(params.io_threads, params.io_block, params.prefetch_reads, on_end);
}

// Its threads end before what they use; until then a read that ends may begin another.
expert_store::~expert_store() { io_->stop(); }

uint64_t expert_store::table_bytes(const expert_index & index, const hobbit_params & params) {
    const std::vector<uint32_t> layers = index.layer_experts();
    const uint64_t slots  = std::accumulate(layers.begin(), layers.end(), (uint64_t) 0) * (index.has_low ? 2 : 1);
    const uint64_t n      = (uint64_t) layers.size() * index.n_expert;
    const uint64_t counts = 2 * sizeof(uint64_t);  // uses_, loads_
    const uint64_t history =
        params.eviction_rule == HOBBIT_EVICT_FORESIGHT ? foresight::bytes((uint32_t) layers.size(), index.n_expert) : 0;
    return slots * sizeof(cache_entry) + n * (sizeof(use_record) + 2 * sizeof(cache_entry *) + counts) + history;
}

std::byte * expert_store::slice(const cache_entry & entry, uint32_t part) const {
    const moe_layer &  layer = index_.layers()[entry.layer];
    const projection & proj  = layer.projections[part];
    const extent       x     = proj.source[entry.precision].expert(entry.expert);
    const uint64_t     begin = index_.source(x.file).around(x.offset, x.bytes).begin;
    return entry.data + proj.slot_offset[entry.precision] + (x.offset - begin);
}

io_request expert_store::read_of(uint32_t layer, uint32_t expert, precision p, uint32_t part, std::byte * room) const {
    const extent x = index_.layers()[layer].projections[part].source[(int) p].expert(expert);
    return request_of(index_.source(x.file), x, room);
}

void expert_store::request_part(cache_entry & entry, uint32_t part, std::vector<io_request> & out) {
    const auto         p    = (precision) entry.precision;
    const projection & proj = index_.layers()[entry.layer].projections[part];
    io_request         r    = read_of(entry.layer, entry.expert, p, part, entry.data + proj.slot_offset[(int) p]);
    r.owner                 = &entry;
    r.part                  = part;
    r.cancel                = &entry.cancel;
    r.urgent                = &entry.demanded;
    entry.reading |= 1u << part;
    out.push_back(r);
}

void expert_store::count_hit(cache_entry & entry, bool was_in_flight) {
    if (entry.prefetched) {
        entry.prefetched  = false;
        hobbit_counts & c = counts_[entry.layer];
        (was_in_flight ? c.prefetches_late : c.prefetches_useful)++;
    }
}

void expert_store::count_evicted(const cache_entry & entry) {
    if (entry.prefetched) {
        hobbit_counts & c = counts_[entry.layer];
        c.prefetches_wasted++;
        c.bytes_wasted += entry.bytes;
    }
}

// Neither there nor on its way.
bool expert_store::missing(const cache_entry & entry, uint32_t part) {
    return ((entry.parts.load(std::memory_order_relaxed) | entry.reading) & (1u << part)) == 0;
}

// Asks again for what a cancelled or failed read left out of an entry that is wanted now.
void expert_store::resume(cache_entry & entry) {
    entry.cancel.store(false, std::memory_order_relaxed);
    std::vector<io_request> requests;
    for (uint32_t part = 0; part < index_.layers()[entry.layer].projections.size(); ++part) {
        if (missing(entry, part)) {
            request_part(entry, part, requests);
        }
    }
    io_->demand(requests);
}

// Every expert has a slot in high precision, which serves low needs too: a low copy would have to be read again each time.
bool expert_store::high_serves_all() const {
    return now_.high_serves_low && cache_->shape().n_slots[0] == cache_->n_experts();
}

void expert_store::observe(uint32_t layer, const int32_t * ids, size_t stride, uint32_t k, uint32_t n_tokens) {
    if (foresight_) {
        std::lock_guard<std::mutex> lock(mutex_);
        foresight_->observe(layer, ids, stride, k, n_tokens);
        now_.clock   = foresight_->clock();
        now_.recency = foresight_->recency();
    }
}

// One time for all reads that a layer asks for at once: they are waited for together.
void expert_store::note_asked(bool demand, uint32_t layer) {
    if (times_ != nullptr && times_->on()) {
        asked_[demand][layer] = timeline::clock::now();
    }
}

void expert_store::begin_batch(uint32_t n_tokens) {
    std::lock_guard<std::mutex> lock(mutex_);
    now_.layer        = 0;
    now_.token_before = now_.token;
    now_.token += n_tokens;
    n_tokens_ += n_tokens;
    move_border();
    inserted_[0] = inserted_[1] = 0;
}

void expert_store::acquire(uint32_t layer, policy::precision_rule rule, std::vector<expert_want> & wants) {
    using policy::action;
    using policy::copy_state;
    std::unique_lock<std::mutex> lock(mutex_);
    to_warm_.clear();
    now_.layer = layer;
    cache_->pass++;

    const auto state_of = [](const cache_entry * e) {
        return e == nullptr                              ? copy_state::absent
               : e->now == cache_entry::state::in_flight ? copy_state::in_flight
                                                         : copy_state::resident;
    };
    hobbit_counts & c = counts_[layer];
    note_asked(true, layer);

    // First pin all that is there, so that making room for the rest cannot evict it.
    for (expert_want & w : wants) {
        cache_entry * high = cache_->find(layer, w.expert, 0);
        cache_entry * low  = cache_->find(layer, w.expert, 1);
        w.action           = policy::resolve(rule, w.need, state_of(high), state_of(low));
        w.action           = w.action == action::load_low && high_serves_all() ? action::load_high : w.action;
        w.entry            = w.action == action::use_high ? high : w.action == action::use_low ? low : nullptr;
        use_record & use   = cache_->use(layer, w.expert);
        if (w.need != policy::need::never) {
            use.last_token = now_.token;
            use.uses += w.count;
            use.high_share += HIGH_SHARE_STEP * ((w.need == policy::need::high ? 1.0f : 0.0f) - use.high_share);
        }
        switch (w.action) {
            case action::use_high:
                c.hits_high += w.count;
                break;
            case action::use_low:
                c.hits_low += w.count;
                break;
            case action::load_high:
                c.loads_high++, c.hits_high += w.count - 1;
                break;
            case action::load_low:
                c.loads_low++, c.hits_low += w.count - 1;
                break;
            case action::skip:
                c.skips += w.count;
                break;
        }
        c.selections += w.count;
        uses_[(size_t) layer * index_.n_expert + w.expert] += w.count;
        loads_[(size_t) layer * index_.n_expert + w.expert] += w.action == action::load_high || w.action == action::load_low;
        if (w.action == action::use_high || w.action == action::load_high) {
            use.high_uses += w.count;
        } else if (w.action != action::skip) {
            use.low_uses += w.count;
        }
        if (w.entry != nullptr) {
            cache_->pin(w.entry);
            cache_->touch(w.entry);
            if (w.action == action::use_high) {
                cache_->used(layer, w.expert, true);
            }
            const bool in_flight = w.entry->now == cache_entry::state::in_flight;
            w.ahead              = w.entry->prefetched;
            count_hit(*w.entry, in_flight);
            if (in_flight) {
                w.entry->demanded.store(true, std::memory_order_relaxed);
                io_->promote(w.entry);
                resume(*w.entry);
            }
        }
    }
    drop_stale_prefetches(layer, wants);

    for (int p = 0; p < N_PRECISION; ++p) {
        const action load = p == 0 ? action::load_high : action::load_low;
        const auto   n =
            (uint32_t) std::count_if(wants.begin(), wants.end(), [&](const expert_want & w) { return w.action == load; });
        cache_->make_room(p, n - std::min(n, cache_->n_free(p)), now_);
    }
    for (expert_want & w : wants) {
        if (w.action == action::load_high || w.action == action::load_low) {
            const int p = w.action == action::load_high ? 0 : 1;
            if (p == 0) {
                cache_->used(layer, w.expert, false);
            }
            w.entry = cache_->insert(layer, w.expert, p, now_);
            if (w.entry != nullptr) {
                inserted_[p] += cache_->shape().slot_bytes[p];
                cache_->pin(w.entry);
                w.entry->demanded.store(true, std::memory_order_relaxed);
            }
        }
    }
    // By projection, then by expert: the first product can start when the first slices are there.
    std::vector<io_request> requests;
    const auto              n_parts = (uint32_t) index_.layers()[layer].projections.size();
    for (uint32_t part = 0; part < n_parts; ++part) {
        for (const expert_want & w : wants) {
            if (w.entry != nullptr && (w.action == action::load_high || w.action == action::load_low)) {
                request_part(*w.entry, part, requests);
            }
        }
    }
    lock.unlock();  // what was asked for is pinned: nobody else touches it
    io_->demand(requests);
    lock.lock();
    // After the token's last requests have left, and only where anything is evicted.
    if (foresight_ && layer + 1 == index_.layers().size() && (cache_->full(0) || cache_->full(1))) {
        foresight_->refresh();
    }
}

uint64_t expert_store::bytes_needed() {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t                    sum = 0;
    for (const hobbit_counts & c : counts_) {
        sum += c.bytes_demand + c.bytes_prefetch - c.bytes_wasted;
    }
    return sum;
}

void expert_store::release(const std::vector<expert_want> & wants) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const expert_want & w : wants) {
        if (w.entry != nullptr) {
            cache_->unpin(w.entry);
            settle(*w.entry);
        }
    }
}

void expert_store::begin_sequence() {
    std::lock_guard<std::mutex> lock(mutex_);
    cache_->reset_uses();
    if (foresight_) {
        foresight_->begin_sequence();
    }
    now_.token = now_.token_before = border_seen_ = 0;
}

void expert_store::add_counts(uint32_t layer, const hobbit_counts & more) {
    std::lock_guard<std::mutex> lock(mutex_);
    hobbit::add_counts(counts_[layer], more);
}

void expert_store::layer_counts(uint32_t layer, hobbit_counts & out) {
    std::lock_guard<std::mutex> lock(mutex_);
    out = counts_[layer];
}

void expert_store::expert_uses(uint32_t layer, std::vector<uint64_t> & uses, std::vector<uint64_t> & loads) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t                begin = (size_t) layer * index_.n_expert;
    const size_t                end   = begin + index_.layers()[layer].n_expert;
    uses.assign(uses_.begin() + (ptrdiff_t) begin, uses_.begin() + (ptrdiff_t) end);
    loads.assign(loads_.begin() + (ptrdiff_t) begin, loads_.begin() + (ptrdiff_t) end);
}

void expert_store::stats(hobbit_stats & out) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto & c : counts_) {
        hobbit::add_counts(out.total, c);
    }
    out.n_tokens      = n_tokens_;
    out.pool_bytes    = align_up(stream_bytes_ + cache_->limit(), PAGE);
    out.slots_high    = cache_->shape().n_slots[0];
    out.slots_low     = cache_->shape().n_slots[1];
    out.resident_high = cache_->resident(0);
    out.resident_low  = cache_->resident(1);
    out.direct_io     = index_.direct();
    out.warmed        = n_warmed_;
    out.bytes_warmed  = bytes_warmed_;
}

void expert_store::reset_stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::fill(counts_.begin(), counts_.end(), hobbit_counts {});
    // What is under way counts from now on, and what came before does not: no more is wasted than was read ahead.
    cache_->for_each([this](cache_entry & e) {
        if (e.prefetched && e.now == cache_entry::state::in_flight) {
            counts_[e.layer].prefetches++;
            counts_[e.layer].bytes_prefetch += e.bytes;
        } else {
            e.prefetched = false;
        }
    });
    std::fill(uses_.begin(), uses_.end(), 0);
    std::fill(loads_.begin(), loads_.end(), 0);
    n_tokens_ = n_warmed_ = bytes_warmed_ = 0;
}

}  // namespace hobbit
