// Routing replayed without a model.
#include "../replay/replay.h"

#include "common.h"

using hobbit::copy_in;
using hobbit::copy_out;
using hobbit::guarded;
using hobbit::params_of;
using hobbit::require;

struct hobbit_replay {
    std::unique_ptr<hobbit::expert_index> index;
    std::unique_ptr<hobbit::replay>       core;
};

hobbit_replay * hobbit_replay_init(const hobbit_replay_model * model, const hobbit_routing * routing, const uint32_t * lens,
                                   uint64_t n_lens, hobbit_error * error) {
    hobbit_replay * out = nullptr;
    guarded(error, [&] {
        const hobbit_replay_model of    = copy_in(model, "model");
        const hobbit_routing      given = copy_in(routing, "routing");
        require(lens != nullptr && n_lens > 0, "the lengths of the sequences are missing");
        auto r = std::make_unique<hobbit_replay>();
        if (of.path != nullptr) {
            r->index = std::make_unique<hobbit::expert_index>(of.path, "", true);
        } else {
            r->index =
                std::make_unique<hobbit::expert_index>(given.n_layer, of.n_expert, given.k, of.bytes_high, of.bytes_low);
        }
        r->core = std::make_unique<hobbit::replay>(*r->index, given, std::vector<uint32_t>(lens, lens + n_lens));
        out     = r.release();
    });
    return out;
}

void hobbit_replay_free(hobbit_replay * r) { delete r; }

void hobbit_replay_sizes(const hobbit_replay * r, uint64_t * bytes) {
    if (r != nullptr && bytes != nullptr) {
        std::copy_n(r->index->max_expert, 2, bytes);
    }
}

hobbit_status hobbit_replay_run(hobbit_replay * r, const hobbit_params * params, const hobbit_replay_setup * setup,
                                hobbit_replay_result * result, hobbit_error * error) {
    return guarded(error, [&] {
        require(r != nullptr, "no replay");
        const hobbit_replay_setup given = copy_in(setup, "setup");
        require(given.latency >= 0.0 && given.token_seconds >= 0.0 && given.bandwidth >= 0.0,
                "times and the bandwidth must not be negative");
        require(given.expert_share >= 0.0 && given.expert_share <= 1.0, "expert_share must be 0 to 1");
        hobbit::replay_setup s;
        s.params = params_of(params);
        hobbit::check_params(s.params);
        s.pool_bytes     = hobbit::replay_pool(*r->index, s.params, given.cache_share, given.pool_bytes);
        s.by_selection   = given.by_selection != 0;
        s.keep_uses      = given.keep_uses != 0;
        s.disk.latency   = given.latency;
        s.disk.bandwidth = given.bandwidth > 0.0 ? given.bandwidth : s.disk.bandwidth;
        s.layer_seconds  = given.token_seconds / (double) r->index->layers().size();
        s.expert_share   = given.expert_share;

        const hobbit::replay_result got = r->core->run(s);
        hobbit_replay_result        out = {};
        out.stats                       = got.stats;
        out.stats.struct_size           = sizeof(out.stats);
        out.stats.n_moe_layer           = (uint32_t) r->index->layers().size();
        out.seconds                     = got.seconds;
        out.stall_seconds               = got.stall;
        copy_out(result, out);
    });
}

hobbit_status hobbit_replay_bound(hobbit_replay * r, const hobbit_params * params, const hobbit_replay_setup * setup,
                                  hobbit_replay_result * result, hobbit_error * error) {
    return guarded(error, [&] {
        require(r != nullptr, "no replay");
        const hobbit_replay_setup given = copy_in(setup, "setup");
        const hobbit_params       p     = params_of(params);
        hobbit::check_params(p);
        const auto got = r->core->bound(p, hobbit::replay_pool(*r->index, p, given.cache_share, given.pool_bytes));

        hobbit_replay_result out     = {};
        out.stats.struct_size        = sizeof(out.stats);
        out.stats.n_moe_layer        = (uint32_t) r->index->layers().size();
        out.stats.n_tokens           = got.n_tokens;
        out.stats.total.selections   = got.selections;
        out.stats.total.hits_high    = got.hits;
        out.stats.total.skips        = got.skips;
        out.stats.total.loads_high   = got.selections - got.hits - got.skips;
        out.stats.total.bytes_demand = got.bytes;
        copy_out(result, out);
    });
}
