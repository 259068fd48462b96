#include "replay.h"

#include "../base/error.h"

#include <algorithm>
#include <numeric>

namespace hobbit {

static constexpr double NEVER = std::numeric_limits<double>::infinity();

replay::replay(const expert_index & index, const hobbit_routing & routing, std::vector<uint32_t> lens) :
    index_(index), routing_(routing, index.layer_experts(), index.n_expert_used), lens_(std::move(lens)) {
    const uint64_t n = std::accumulate(lens_.begin(), lens_.end(), (uint64_t) 0);
    if (n != routing.n_rows || std::count(lens_.begin(), lens_.end(), 0u) > 0) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, "the lengths of the sequences do not sum to the tokens of the trace");
    }
    if (routing.n_layer != index.layers().size()) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT,
             format("the trace has %u layers, the model %zu", routing.n_layer, index.layers().size()));
    }
}

// One run: what the compute threads do, on one thread and a virtual clock.
class replay::runner {
  public:
    runner(const expert_index & index, const replay_setup & setup, recorded_routing & routing) :
        index_(index), setup_(setup), dispatcher_(index, setup.params, setup.pool_bytes, parts(setup)) {
        dispatcher_.set_routing(&routing);
        sel_.ids_stride = sel_.weights_stride = sel_.k = index.n_expert_used;
        sel_.n_tokens                                  = 1;
        ids_.resize(sel_.k);
        sel_.ids = ids_.data();
    }

    void sequence() {
        if (!setup_.keep_uses) {
            dispatcher_.store().begin_sequence();
        }
    }

    void token() {
        for (uint32_t layer = 0; layer < index_.layers().size(); ++layer) {
            compute(setup_.layer_seconds * (1.0 - setup_.expert_share));
            layer_pass::selections sel = sel_;
            dispatcher_.route(layer, nullptr, sel, ids_.data(), {}, nullptr);
            products(layer);
        }
    }

    // A layer's selections one by one.
    void selections(uint32_t layer, const uint16_t * ids, uint32_t k) {
        for (uint32_t i = 0; i < k; ++i) {
            if (i == 0) {
                std::copy_n(ids, k, ids_.begin());
                dispatcher_.store().observe(layer, ids_.data(), k, k, 1);
            }
            wants_.assign(1, expert_want());
            wants_[0].expert = ids[i];
            if (layer == 0 && i == 0) {
                dispatcher_.store().begin_batch(1);
            }
            dispatcher_.store().acquire(layer, policy::precision_rule::exact, wants_);
            if (wants_[0].entry == nullptr) {  // no slot: its layer has none
                for (uint32_t part = 0; part < index_.layers()[layer].projections.size(); ++part) {
                    expert_store & store = dispatcher_.store();
                    store.stream(layer, ids[i], precision::high, part, *store.stream_slots()[0]);
                    disk_->drain();
                }
            }
            disk_->drain();
            dispatcher_.store().release(wants_);
        }
    }

    replay_result result() {
        replay_result out;
        dispatcher_.pass().release();
        dispatcher_.stats(out.stats);
        out.seconds = clock_;
        out.stall   = stall_;
        return out;
    }

  private:
    dispatcher_parts parts(const replay_setup & setup) {
        dispatcher_parts p;
        p.threads     = false;
        p.make_reader = [this, &setup](const hobbit_params & params, reader::handler on_end) {
            disk_model model   = setup.disk;
            model.depth        = params.io_threads;
            model.block        = params.io_block;
            model.max_prefetch = params.prefetch_reads;
            auto disk          = std::make_unique<sim_disk>(model, std::move(on_end));
            disk_              = disk.get();
            return disk;
        };
        return p;
    }

    void compute(double seconds) {
        clock_ += seconds;
        disk_->advance(clock_);
    }

    // The layer's products, as ggml/mul-mat-id.cpp goes through them: what is there first, the rest as it arrives.
    void products(uint32_t layer) {
        layer_pass & pass    = dispatcher_.pass();
        const auto   n_parts = (uint32_t) index_.layers()[layer].projections.size();
        const double seconds = setup_.layer_seconds * setup_.expert_share / (sel_.k * n_parts);
        for (uint32_t part = 0; part < n_parts; ++part) {
            pass.begin_streams(part);
            left_.resize(pass.items().size());
            std::iota(left_.begin(), left_.end(), (size_t) 0);
            while (!left_.empty()) {
                const auto ready =
                    std::find_if(left_.begin(), left_.end(), [&](size_t i) { return pass.slice(part, i) != nullptr; });
                if (ready == left_.end()) {
                    wait();
                    continue;
                }
                compute(seconds * pass.items()[*ready].n_rows);
                pass.item_done(part, *ready);
                left_.erase(ready);
            }
        }
    }

    void wait() {
        const double next = disk_->next_event();
        if (next == NEVER) {
            fail(HOBBIT_ERR_INTERNAL, "the replay waits for a read that nobody asked for");
        }
        stall_ += next - clock_;
        clock_ = next;
        disk_->advance(clock_);
    }

    const expert_index & index_;
    const replay_setup   setup_;
    sim_disk *           disk_ = nullptr;  // of the store
    dispatcher           dispatcher_;

    layer_pass::selections   sel_;
    std::vector<int32_t>     ids_;
    std::vector<size_t>      left_;
    std::vector<expert_want> wants_;
    double                   clock_ = 0.0;
    double                   stall_ = 0.0;
};

replay_result replay::run(const replay_setup & setup) {
    if (setup.by_selection && serving_of(index_, setup.params).rule != policy::precision_rule::exact) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT,
             "selection by selection goes with one precision only: precisions are given to a token's "
             "selections together");
    }
    routing_.rewind();
    runner   r(index_, setup, routing_);
    uint64_t row = 0;
    for (const uint32_t n : lens_) {
        r.sequence();
        for (uint32_t t = 0; t < n; ++t, ++row) {
            if (!setup.by_selection) {
                r.token();
                continue;
            }
            for (uint32_t layer = 0; layer < routing_.n_layer(); ++layer) {
                r.selections(layer, routing_.row_ids(row, layer), index_.n_expert_used);
            }
        }
    }
    return r.result();
}

uint64_t replay_pool(const expert_index & index, const hobbit_params & params, double share, uint64_t bytes) {
    if (bytes == 0) {
        if (!(share > 0.0 && share <= 1.0)) {
            fail(HOBBIT_ERR_INVALID_ARGUMENT, "the cache is a share of all experts, above 0 and at most 1");
        }
        const double   all   = (double) index.layers().size() * index.n_expert;
        const uint64_t slots = (uint64_t) (share * all + 1e-6);
        if (slots < index.n_expert_used) {
            fail(HOBBIT_ERR_BUDGET,
                 format("a cache of %.3g %% of the experts is too small: a layer of one token needs %u of %.0f",
                        100.0 * share, index.n_expert_used, all));
        }
        bytes = pool_min(index) + (slots - index.n_expert_used) * index.max_slot[0];
    }
    return std::min(bytes, pool_max(index, params));
}

bound_result replay::bound(const hobbit_params & params, uint64_t pool_bytes) const {
    // The needs as dispatcher::route and layer_pass::build come to them.
    policy::serving           how      = serving_of(index_, params);
    const bool                adaptive = params.t1 < 0.0f && how.rule == policy::precision_rule::miss;
    policy::threshold_profile profile;
    const uint32_t            k = index_.n_expert_used;
    std::vector<policy::need> needs(k, policy::need::high);
    std::vector<float>        scores(k);

    std::vector<bound_request> requests;
    requests.reserve(routing_.n_rows() * routing_.n_layer() * k);
    for (uint64_t row = 0; row < routing_.n_rows(); ++row) {
        if (adaptive) {
            how.t = profile.at_quantiles(how.t);
        }
        for (uint32_t layer = 0; layer < routing_.n_layer(); ++layer) {
            if (how.by_weight(k)) {
                policy::assess(routing_.row_weights(row, layer), k, layer, how, needs.data(), scores.data());
                if (adaptive) {
                    profile.add(scores.data(), k);
                }
            }
            for (uint32_t i = 0; i < k; ++i) {
                requests.push_back({ layer * index_.n_expert + routing_.row_ids(row, layer)[i], needs[i] });
            }
        }
    }
    // One precision: whole experts. Two: all bytes of the slots, whatever their division.
    const pool_plan plan = plan_pool(index_, params, pool_bytes);
    const uint64_t  room = pool_bytes - plan.stream_bytes;
    const bool      two  = how.rule != policy::precision_rule::exact && how.rule != policy::precision_rule::drop;
    const uint64_t  high = index_.max_expert[0];
    const uint64_t  low  = two ? index_.max_expert[1] : 0;
    const uint64_t  capacity =
        two ? (uint64_t) ((double) room / (double) index_.max_slot[0] * (double) high) : room / index_.max_slot[0] * high;
    bound_result out = belady(requests, (uint32_t) index_.layers().size() * index_.n_expert, high, low, capacity, two);
    out.n_tokens     = routing_.n_rows();
    return out;
}

}  // namespace hobbit
