// A session: a model file, its expert pool and its parameters; and what is asked of the library itself.
#include "../ggml/compute-probe.h"
#include "../ggml/compute-threads.h"
#include "../ggml/context-memory.h"
#include "../ggml/embedding-rows.h"
#include "../ggml/expert-buffer.h"
#include "../ggml/routers.h"
#include "../io/fingerprint.h"
#include "../io/read-probe.h"
#include "../policy/mode.h"
#include "common.h"

using hobbit::copy_in;
using hobbit::copy_out;
using hobbit::guarded;
using hobbit::params_of;
using hobbit::require;
using hobbit::session;

extern "C" const char * hobbit_patch_id(void);  // in libllama

namespace {

hobbit_params defaults(const hobbit::policy::mode & mode) {
    hobbit_params p   = {};
    p.struct_size     = sizeof(p);
    p.precision_rule  = mode.precision_rule;
    p.eviction_rule   = mode.eviction_rule;
    p.t1              = -1.0f;  // at the paper's quantiles
    p.t2              = -1.0f;
    p.renormalize     = 1;
    p.w_lru           = 0.25f;
    p.w_lfu           = 0.25f;
    p.w_lhu           = 0.25f;
    p.w_fld           = 0.25f;
    p.prefetch_depth  = mode.prefetch_depth;
    p.prefetch_reads  = 3;  // a demand read waits for those that are running
    p.norm_correction = 1;
    p.io_threads      = 8;
    p.io_block        = 512 * 1024;
    p.direct_io       = 1;
    p.low_share       = mode.low_share;
    p.drop_fraction   = 0.0f;
    p.max_experts     = 0;
    p.prefetch_extra  = mode.prefetch_extra;
    p.prefill_low     = mode.prefill_low;
    p.prefetch_always = mode.prefetch_always;
    p.fixed_split     = 0;
    p.gate_correction = mode.gate_correction;
    return p;
}

// Called by ggml after each node of a graph; true stops llama_decode.
bool abort_on_failure(void * data) { return ((hobbit_session *) data)->core->failed(); }

}  // namespace

hobbit_params hobbit::params_of(const hobbit_params * params) {
    return copy_in(params, "params", defaults(*hobbit::policy::find_mode("hobbit")));
}

const char * hobbit_version(void) { return HOBBIT_VERSION; }

int32_t hobbit_abi_version(void) { return HOBBIT_ABI_VERSION; }

const char * hobbit_upstream_commit(void) { return HOBBIT_UPSTREAM_COMMIT; }

const char * hobbit_patches(void) { return HOBBIT_PATCHES; }

const char * hobbit_loaded_patches(void) { return hobbit_patch_id(); }

hobbit_status hobbit_params_init(hobbit_params * params, const char * mode, hobbit_error * error) {
    return guarded(error, [&] {
        const auto * row = hobbit::policy::find_mode(mode);
        if (row == nullptr) {
            hobbit::fail(HOBBIT_ERR_INVALID_ARGUMENT,
                         hobbit::format("unknown mode '%s'; there are: %s", mode == nullptr ? "" : mode,
                                        hobbit::policy::mode_names().c_str()));
        }
        copy_out(params, defaults(*row));
    });
}

static void copy_text(const std::string & from, char * text, size_t size) {
    require(text != nullptr && size > from.size(), "there is too little room for the text");
    memcpy(text, from.c_str(), from.size() + 1);
}

hobbit_status hobbit_fingerprint(const char * path, char * text, size_t size, hobbit_error * error) {
    return guarded(error, [&] {
        require(path != nullptr, "no path");
        copy_text(hobbit::fingerprint(hobbit::expert_index(path, "", true)), text, size);
    });
}

hobbit_status hobbit_session_fingerprint(const hobbit_session * s, char * text, size_t size, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        copy_text(hobbit::fingerprint(s->core->index()), text, size);
    });
}

hobbit_session * hobbit_session_init(const char * path, const char * low_path, const hobbit_params * params,
                                     hobbit_error * error) {
    hobbit_session * out = nullptr;
    guarded(error, [&] {
        if (strcmp(hobbit_patches(), hobbit_loaded_patches()) != 0) {
            hobbit::fail(HOBBIT_ERR_STATE,
                         std::string("another libllama was loaded before ours (it has the patches '") +
                             hobbit_loaded_patches() + "', this library needs '" + hobbit_patches() +
                             "'): import hobbit_cpp before llama_cpp, and install one version of hobbit-cpp only");
        }
        require(path != nullptr, "path is needed");
        const hobbit_params p = params_of(params);
        hobbit::register_expert_buffers();
        auto core = std::make_shared<session>(path, low_path == nullptr ? "" : low_path, p);
        hobbit::check_kernels(core->index());
        hobbit::arrange_repacking(*core);
        core->set_routers(std::make_unique<hobbit::ggml_routers>(core->index()));
        out = new hobbit_session { std::move(core), nullptr };
    });
    return out;
}

void hobbit_session_free(hobbit_session * s) {
    if (s != nullptr) {
        s->core->stop();
        delete s;
    }
}

hobbit_status hobbit_session_info(const hobbit_session * s, hobbit_model_info * info, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        const auto &      index = s->core->index();
        hobbit_model_info i     = {};
        i.n_layer               = index.n_block;
        i.n_moe_layer           = (uint32_t) index.layers().size();
        i.n_expert              = index.n_expert;
        i.n_expert_used         = index.n_expert_used;
        i.has_low               = index.has_low;
        i.bytes_dense           = index.bytes_dense;
        i.bytes_parsed          = index.bytes_parsed;
        i.bytes_high            = index.bytes_total[0];
        i.bytes_low             = index.bytes_total[1];
        i.bytes_expert_high     = index.max_expert[0];
        i.bytes_expert_low      = index.max_expert[1];
        for (const auto & layer : index.layers()) {
            i.bytes_cycle += layer.n_used * layer.expert_bytes(hobbit::precision::high);
        }
        i.slot_high    = index.max_slot[0];
        i.slot_low     = index.max_slot[1];
        i.pool_min     = hobbit::pool_min(index);
        i.pool_max     = hobbit::pool_max(index, s->core->params());
        i.can_resize   = hobbit::find_eviction_rule(s->core->params().eviction_rule)->split == hobbit::slot_split::none;
        i.direct_io    = index.direct();
        i.io_alignment = index.alignment();
        const hobbit::embedding_table & rows = index.embeddings();
        if (rows.n_rows > 0) {
            i.bytes_embeddings = (uint64_t) rows.n_rows * rows.source.row_bytes;
            i.bytes_rows_kept  = hobbit::row_cache::bytes(rows.source.row_bytes, (uint64_t) rows.n_rows);
        }
        i.bytes_tables = hobbit::expert_store::table_bytes(index, s->core->params()) +
                         hobbit::prefetcher::bytes_learned(index, s->core->params());
        copy_out(info, i);
    });
}

void hobbit_session_bind_thread(hobbit_session * s) { hobbit::bind_thread(s == nullptr ? nullptr : s->core); }

void hobbit_session_keep_embeddings_on_disk(hobbit_session * s) {
    if (s != nullptr) {
        s->core->embeddings_on_disk = true;
    }
}

const void * hobbit_session_buft_overrides(hobbit_session * s) {
    const void * out = nullptr;
    guarded(nullptr, [&] { out = s == nullptr ? nullptr : hobbit::buft_overrides(*s->core); });
    return out;
}

void * hobbit_abort_callback(void) { return (void *) abort_on_failure; }

hobbit_status hobbit_context_fit(void * context, uint32_t n_tokens, uint32_t n_outputs, uint64_t * buffers, uint64_t * work,
                                 hobbit_error * error) {
    return guarded(error, [&] {
        require(context != nullptr && buffers != nullptr && work != nullptr, "context, buffers or work is NULL");
        const hobbit::batch_bytes bytes = hobbit::fit_batches((llama_context *) context, n_tokens, n_outputs);
        *buffers                        = bytes.buffers;
        *work                           = bytes.work;
    });
}

uint64_t hobbit_context_resident_bytes(const void * context) {
    uint64_t n = 0;
    guarded(nullptr, [&] { n = hobbit::resident_bytes((const llama_context *) context); });
    return n;
}

hobbit_status hobbit_session_start(hobbit_session * s, uint64_t pool_bytes, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        s->core->start(pool_bytes);
    });
}

hobbit_status hobbit_session_keep_threads(hobbit_session * s, void * context, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr && context != nullptr, "session and context are needed");
        if (s->threads != nullptr) {
            hobbit::fail(HOBBIT_ERR_STATE, "the session has compute threads already");
        }
        s->threads = hobbit::attach_threads(context);
    });
}

void hobbit_session_stop(hobbit_session * s) {
    if (s != nullptr) {
        s->core->stop();
    }
}

hobbit_status hobbit_session_resize(hobbit_session * s, uint64_t pool_bytes, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "session is NULL");
        s->core->resize(pool_bytes);
    });
}

void hobbit_session_begin_sequence(hobbit_session * s) {
    if (s != nullptr) {
        s->core->begin_sequence();
    }
}

void hobbit_session_cancel(hobbit_session * s) {
    guarded(nullptr, [&] {
        if (s != nullptr) {
            s->core->cancel();
        }
    });
}

hobbit_status hobbit_session_take_error(hobbit_session * s, hobbit_error * error) {
    return guarded(error, [&] {
        std::exception_ptr why;
        if (s != nullptr && s->core->take_error(why) && why) {
            std::rethrow_exception(why);
        }
    });
}

hobbit_status hobbit_session_stats(hobbit_session * s, hobbit_stats * stats, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        hobbit_stats out = {};
        out.n_moe_layer  = (uint32_t) s->core->index().layers().size();
        s->core->stats(out);
        copy_out(stats, out);
    });
}

hobbit_status hobbit_session_layer_stats(hobbit_session * s, uint32_t layer, hobbit_counts * counts, uint32_t * block,
                                         hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr && counts != nullptr && layer < s->core->index().layers().size(), "no such layer");
        *counts = {};
        s->core->layer_stats(layer, *counts);
        if (block != nullptr) {
            *block = s->core->index().layers()[layer].block;
        }
    });
}

void hobbit_session_reset_stats(hobbit_session * s) {
    if (s != nullptr) {
        s->core->reset_stats();
    }
}

uint32_t hobbit_session_expert_uses(hobbit_session * s, uint32_t layer, uint64_t * uses, uint64_t * loads, uint32_t n) {
    uint32_t found = 0;
    guarded(nullptr, [&] {
        if (s == nullptr || layer >= s->core->index().layers().size()) {
            return;
        }
        std::vector<uint64_t> all[2];
        s->core->expert_uses(layer, all[0], all[1]);
        uint64_t * to[2] = { uses, loads };
        for (int i = 0; i < 2; ++i) {
            if (to[i] != nullptr) {
                std::copy_n(all[i].begin(), std::min<size_t>(n, all[i].size()), to[i]);
            }
        }
        found = s->core->index().layers()[layer].n_expert;
    });
    return found;
}

uint64_t hobbit_session_heat(hobbit_session * s, hobbit_heat * heat, uint64_t n) {
    std::vector<hobbit_heat> found;
    guarded(nullptr, [&] {
        if (s != nullptr && s->core->store() != nullptr && s->core->store()->heat(found) && heat != nullptr) {
            std::copy_n(found.begin(), std::min<uint64_t>(n, found.size()), heat);
        }
    });
    return found.size();
}

hobbit_status hobbit_session_warm(hobbit_session * s, const hobbit_heat * heat, uint64_t n, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr && heat != nullptr, "session and heat are needed");
        const auto & index = s->core->index();
        require(n == index.layers().size() * index.n_expert, "the heat is that of another model");
        const auto is_share = [](float x) { return x >= 0.0f && x <= 1.0f; };
        require(std::all_of(heat, heat + n, [&](auto & h) { return is_share(h.rate) && is_share(h.high_share); }),
                "a rate or share is not in 0..1");
        if (s->core->store() == nullptr) {
            hobbit::fail(HOBBIT_ERR_STATE, "there is no expert pool before the session is started");
        }
        s->core->store()->warm(heat);
    });
}

hobbit_status hobbit_probe_read(hobbit_session * s, bool low, uint32_t depth, double seconds, hobbit_read_probe * probe,
                                hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        require(depth >= 1 && depth <= 64, "depth must be 1 to 64");
        require(seconds > 0.0 && seconds <= 60.0, "seconds must be above 0, at most 60");
        const auto found =
            hobbit::probe_reads(s->core->index(), low ? hobbit::precision::low : hobbit::precision::high, depth, seconds);
        hobbit_read_probe out = {};
        out.reads             = found.reads;
        out.bytes             = found.bytes;
        out.seconds           = found.seconds;
        copy_out(probe, out);
    });
}

hobbit_status hobbit_probe_compute(int32_t type, int64_t n_in, int64_t n_out, uint32_t n_threads, double seconds,
                                   double * bytes_per_second, hobbit_error * error) {
    return guarded(error, [&] {
        require(bytes_per_second != nullptr, "bytes_per_second is needed");
        require(seconds > 0.0 && seconds <= 60.0, "seconds must be above 0, at most 60");
        *bytes_per_second = hobbit::probe_compute(type, n_in, n_out, n_threads, seconds);
    });
}

hobbit_status hobbit_session_set_routing(hobbit_session * s, const hobbit_routing * routing, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        const hobbit_routing given = routing == nullptr ? hobbit_routing {} : copy_in(routing, "routing");
        s->core->set_routing(routing == nullptr ? nullptr : &given);
    });
}

hobbit_status hobbit_session_set_thresholds(hobbit_session * s, float t1, float t2, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        s->core->set_thresholds(t1, t2);
    });
}

hobbit_status hobbit_session_set_sensitivity(hobbit_session * s, const float * a, uint64_t n, hobbit_error * error) {
    return guarded(error, [&] {
        require(s != nullptr, "no session");
        s->core->set_sensitivity(a, n);
    });
}
