/*
 * hobbit.h - the C API of hobbit-cpp, declared only here.
 *
 * Read by C++, by the C test, by cffi (scripts/gen_cffi.py leaves it the declarations and the integer defines) and by people.
 *
 * Conventions
 *  - Handles are opaque and come in init/free pairs; free accepts NULL.
 *  - Parameter and statistics structs begin with `struct_size`, set by the caller to sizeof(the struct); those that come in
 *    arrays (hobbit_counts, hobbit_heat, hobbit_event) do not. A field that a smaller, older struct does not have keeps its
 *    default.
 *  - A call that can fail returns a hobbit_status and takes a caller-owned hobbit_error (may be NULL),
 *    which is written only on failure.
 *  - The library never prints, never aborts and lets no exception cross this boundary.
 *  - Strings are UTF-8 and NUL-terminated. A returned `const char *` lives as long as the handle it came
 *    from, or for ever where there is no handle.
 *  - Sizes are bytes, times are seconds.
 */
#ifndef HOBBIT_H
#define HOBBIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define HOBBIT_API __declspec(dllexport)
#else
#    define HOBBIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Bumped whenever a struct or a signature below changes its meaning. */
#define HOBBIT_ABI_VERSION 2

/* Layers ahead, at most: of prefetch_depth and of recorded predictions. */
#define HOBBIT_MAX_LOOKAHEAD 4

/* ---- versions: checked when the Python package is imported ------------------------------------------- */

HOBBIT_API const char * hobbit_version(void);
HOBBIT_API int32_t      hobbit_abi_version(void);
HOBBIT_API const char * hobbit_upstream_commit(void);
/* The patch series this library was built for, and the one that the loaded libllama was built with. They differ when
 * another libllama was loaded first; then nothing here may be used. */
HOBBIT_API const char * hobbit_patches(void);
HOBBIT_API const char * hobbit_loaded_patches(void);

/* ---- errors ------------------------------------------------------------------------------------------ */

typedef enum hobbit_status {
    HOBBIT_OK                   = 0,
    HOBBIT_ERR_INVALID_ARGUMENT = 1,  /* a parameter out of range; the message names it */
    HOBBIT_ERR_FILE             = 2,  /* cannot open or stat a file; os_errno is set */
    HOBBIT_ERR_FORMAT           = 3,  /* not a GGUF, truncated or corrupt */
    HOBBIT_ERR_NOT_MOE          = 4,  /* a GGUF without routed experts: nothing to offload */
    HOBBIT_ERR_READ             = 5,  /* a read of expert data failed; os_errno is set, 0 for a short read */
    HOBBIT_ERR_BUDGET           = 6,  /* the memory budget is below the smallest that works */
    HOBBIT_ERR_NO_MEMORY        = 7,  /* the system refused an allocation */
    HOBBIT_ERR_UNSUPPORTED      = 8,  /* this model or type cannot be offloaded */
    HOBBIT_ERR_STATE            = 9,  /* call out of order */
    HOBBIT_ERR_INTERNAL         = 10, /* a defect in hobbit-cpp: please report */
    HOBBIT_ERR_CANCELLED        = 11, /* hobbit_session_cancel was called */
    HOBBIT_ERR_SIDECAR          = 12  /* the file with the low-precision copies is damaged or belongs to another model */
} hobbit_status;

typedef struct hobbit_error {
    int32_t status;
    int32_t os_errno;
    char    message[1024];
} hobbit_error;

/* ---- what a file holds ------------------------------------------------------------------------------- */

typedef struct hobbit_model_info {
    uint32_t struct_size;
    uint32_t n_layer;           /* all blocks of the model, dense ones too */
    uint32_t n_moe_layer;       /* blocks with routed experts */
    uint32_t n_expert;          /* most experts in a layer */
    uint32_t n_expert_used;     /* top-k */
    uint32_t has_low;           /* 1: low-precision copies are present for every expert */
    uint64_t bytes_dense;       /* everything that is not a routed expert */
    uint64_t bytes_parsed;      /* about what the metadata (vocabulary) takes while the model is loaded */
    uint64_t bytes_high;        /* routed experts, high precision */
    uint64_t bytes_low;         /* routed experts, low precision */
    uint64_t bytes_expert_high; /* largest single expert (all projections) */
    uint64_t bytes_expert_low;
    uint64_t bytes_cycle; /* experts of one token: sum over layers of k x expert, high precision */
    uint64_t slot_high;   /* memory of one resident high-precision expert, with padding */
    uint64_t slot_low;
    uint64_t pool_min;     /* the smallest expert pool that works */
    uint64_t pool_max;     /* a pool that holds every expert */
    uint32_t can_resize;   /* 1: the pool can change its size, since layers have no slots of their own */
    uint32_t direct_io;    /* 1: reads go past the page cache */
    uint32_t io_alignment; /* of direct reads; 1 when buffered */
    uint64_t bytes_tables; /* what the cache's tables and the correction of predictions come to hold, beside the pool */
    /* Of bytes_dense, token embeddings that may stay on disk (0: there are none, or they are the output matrix as well), and how much of
     * them is kept in memory then. */
    uint64_t bytes_embeddings;
    uint64_t bytes_rows_kept;
} hobbit_model_info;

/* Writes the fingerprint of the routed experts of a model (the first part of a split one) into `text`, at most `size` bytes with
 * the NUL: what binds a sidecar to it, as the string `hobbit.sidecar.fingerprint` in its metadata. It depends on names, types,
 * shapes and sampled bytes of the expert tensors, not on names of files, other metadata or the division into parts. */
HOBBIT_API hobbit_status hobbit_fingerprint(const char * path, char * text, size_t size, hobbit_error * error);

/* ---- session: one loaded model ------------------------------------------------------------------------ */

typedef struct hobbit_session hobbit_session;

typedef enum hobbit_precision_rule {
    HOBBIT_PRECISION_EXACT  = 0, /* every selected expert in high precision */
    HOBBIT_PRECISION_MISS   = 1, /* HOBBIT: low or skip, decided on a cache miss only */
    HOBBIT_PRECISION_WEIGHT = 2, /* by scores alone, whatever is cached: reproducible */
    HOBBIT_PRECISION_DROP   = 3, /* skipped on a cache miss when the router weight is below drop_fraction / k */
    HOBBIT_PRECISION_DEMAND = 4  /* Fate: what is read on demand is low, what is read ahead is high */
} hobbit_precision_rule;

typedef enum hobbit_eviction_rule {
    HOBBIT_EVICT_LRU       = 0,
    HOBBIT_EVICT_LFU       = 1,
    HOBBIT_EVICT_HOBBIT    = 2, /* HOBBIT eq. 3, with the weights below */
    HOBBIT_EVICT_LCU       = 3, /* MoE-APEX: least cost-weighted use */
    HOBBIT_EVICT_FORESIGHT = 4, /* ours: expected uses, or LRU's order where that hits more */
    HOBBIT_EVICT_LAYER_LRU = 5, /* least recently used, each layer with slots of its own */
    HOBBIT_EVICT_LAYER_ARC = 6, /* ARC in the same */
    HOBBIT_EVICT_FATE      = 7  /* Fate: the first layers held whole, ARC in each */
} hobbit_eviction_rule;

typedef struct hobbit_params {
    uint32_t struct_size;
    int32_t  precision_rule; /* hobbit_precision_rule */
    int32_t  eviction_rule;  /* hobbit_eviction_rule */
    float    t1;             /* unimportance up to which an expert is read in high precision (HOBBIT, T1) */
    float    t2;             /* and up to which in low precision; beyond it is skipped (T2) */
    uint32_t renormalize;    /* 1: surviving router weights are scaled up after a skip */
    float    w_lru;          /* weights of eq. 3; they sum to 1 */
    float    w_lfu;
    float    w_lhu;
    float    w_fld;
    uint32_t prefetch_depth;  /* layers ahead, 0 = no prefetch, at most HOBBIT_MAX_LOOKAHEAD */
    uint32_t prefetch_reads;  /* most prefetch reads in flight for a single token; for batches io_threads */
    uint32_t norm_correction; /* 1: router input rescaled by w_norm[l+d]/w_norm[l] before predicting */
    uint32_t io_threads;      /* reader threads = queue depth */
    uint32_t io_block;        /* bytes of one prefetch read between two looks at the abort flag */
    uint32_t direct_io;       /* 1: O_DIRECT where the file system has it */
    float    low_share;       /* share of the pool for low-precision copies, 0..0.9; see fixed_split */
    float    drop_fraction;   /* F of HOBBIT_PRECISION_DROP, which needs no low copies; 0 drops nothing */
    uint32_t max_experts;     /* most experts a token, those of the largest router weights; 0: all that the router selects */
    uint32_t prefetch_extra;  /* experts of a layer that are read ahead beyond the predicted k */
    float prefill_low; /* of a batch, the least popular experts up to this share of the selections are low (Fate); 0: none */
    uint32_t prefetch_always; /* 1: a single token's layers are read ahead whether it pays or not. 0: as trials say */
    uint32_t fixed_split; /* 1: low_share stays as it is. 0: it is a beginning, the division of the pool follows demand */
    uint32_t gate_correction; /* 1: predictions are corrected by what the routers said after earlier ones */
} hobbit_params;

/* Fills `params` with the defaults of a mode: "hobbit", "fate", "lru". HOBBIT_ERR_INVALID_ARGUMENT for another name. */
HOBBIT_API hobbit_status hobbit_params_init(hobbit_params * params, const char * mode, hobbit_error * error);

/* Opens a GGUF (all parts of a split one), reads its header and builds the expert index. No weights are read.
 * `low_path` (may be NULL): a sidecar, a file with the low-precision copies only. It must be bound to this model (see
 * hobbit_fingerprint) and hold a copy of every expert: else HOBBIT_ERR_SIDECAR. */
HOBBIT_API hobbit_session * hobbit_session_init(const char * path, const char * low_path, const hobbit_params * params,
                                                hobbit_error * error);
/* Stops the threads and drops the caller's reference. The memory goes when the llama model is freed as well. */
HOBBIT_API void hobbit_session_free(hobbit_session * session);

/* hobbit_fingerprint of its model, whose metadata is not read again for it. */
HOBBIT_API hobbit_status hobbit_session_fingerprint(const hobbit_session * session, char * text, size_t size,
                                                    hobbit_error * error);

HOBBIT_API hobbit_status hobbit_session_info(const hobbit_session * session, hobbit_model_info * info, hobbit_error * error);

/* Bracket llama_model_load_from_file and llama_init_from_model, on the thread that calls them: expert tensors of the
 * model loaded in between belong to `session`. Pass NULL to end. */
HOBBIT_API void hobbit_session_bind_thread(hobbit_session * session);

/* For llama_model_params.tensor_buft_overrides, llama_context_params.abort_callback and its data. */
HOBBIT_API const void * hobbit_session_buft_overrides(hobbit_session * session);
HOBBIT_API void *       hobbit_abort_callback(void);

/* Before the model is loaded: its token embeddings are not, their rows are read as tokens come (with 4 MiB of them kept). */
HOBBIT_API void hobbit_session_keep_embeddings_on_disk(hobbit_session * session);

/* Lays the compute buffers of a context (a llama_context * that computes nothing now) out for batches of at most `n_tokens` (cut to
 * n_ubatch), of which at most `n_outputs` want logits, and gives their pages back to the system. *buffers: bytes of them that such
 * batches will touch at most. *work: bytes of ggml's work buffer, which stay once they were touched. Larger batches, and more
 * outputs, still work and take more. HOBBIT_ERR_NO_MEMORY. */
HOBBIT_API hobbit_status hobbit_context_fit(void * context, uint32_t n_tokens, uint32_t n_outputs, uint64_t * buffers,
                                            uint64_t * work, hobbit_error * error);
/* Model and context (KV) bytes of the ggml buffers of a llama context, host memory only. */
HOBBIT_API uint64_t hobbit_context_resident_bytes(const void * context);

/* Allocates and pre-faults the expert pool (`pool_bytes`, cut to what is useful) and starts the threads. Decoding before this call
 * fails. HOBBIT_ERR_BUDGET below hobbit_model_info.pool_min. */
HOBBIT_API hobbit_status hobbit_session_start(hobbit_session * session, uint64_t pool_bytes, hobbit_error * error);
/* Stops the threads, for good: decoding fails from then on. Call before the llama model is freed; another needs another session. */
HOBBIT_API void hobbit_session_stop(hobbit_session * session);

/* Keeps one pool of compute threads for a llama_context from graph to graph: the more of its n_threads and n_threads_batch as they
 * are now. The context must not compute after the session was freed. Why: llama.cpp starts new threads for every token, and on
 * two processors with slow reads Linux put both on one of them, where they took turns at every barrier until the first expert
 * product, 14 of 70 ms a token. HOBBIT_ERR_STATE the second time (not where there is but one thread). */
HOBBIT_API hobbit_status hobbit_session_keep_threads(hobbit_session * session, void * context, hobbit_error * error);

/* From now on the expert pool may take `pool_bytes` (at most what is of use): shrinking gives memory back to the system, what is in
 * use at the moment goes at the next tokens. From any thread, not beside start, stop and free. HOBBIT_ERR_BUDGET below
 * hobbit_model_info.pool_min, HOBBIT_ERR_NO_MEMORY (then it is as before), HOBBIT_ERR_UNSUPPORTED with slots of its own for each
 * layer, HOBBIT_ERR_STATE before the start. */
HOBBIT_API hobbit_status hobbit_session_resize(hobbit_session * session, uint64_t pool_bytes, hobbit_error * error);

/* Other thresholds (hobbit_params.t1, t2) from the next batch on, for a session that is started; t1 < 0: the paper's quantiles of the
 * scores seen. HOBBIT_ERR_INVALID_ARGUMENT for t1 > t2 without a sensitivity (below). Not during llama_decode. */
HOBBIT_API hobbit_status hobbit_session_set_thresholds(hobbit_session * session, float t1, float t2, hobbit_error * error);

/* How much it costs to serve each MoE layer low (`hobbit calibrate`): `a` [n], n = n_moe_layer, in proportion to the root of the
 * divergence from exact mode when that layer alone is low. It replaces HOBBIT's eq. 2. With g, a selection's share of its token's
 * router weight:
 *     1 - g > T2, and not the largest of the token  ->  skip
 *     T1 > 0 and 1 - a g <= T1                      ->  high
 *     else                                          ->  low
 * T1 may be above T2. NULL: eq. 2 again. For a session that is started, from the next batch on. Not during llama_decode. */
HOBBIT_API hobbit_status hobbit_session_set_sensitivity(hobbit_session * session, const float * a, uint64_t n,
                                                        hobbit_error * error);

/* A new sequence starts: sequence-level statistics (HOBBIT section 3.4) are reset, the cache keeps its contents. */
HOBBIT_API void hobbit_session_begin_sequence(hobbit_session * session);

/* Stops the llama_decode that is running at its next graph node, as a failed read does; threads that wait for reads wake. From any
 * thread, but not at the same time as start, stop and free. hobbit_session_take_error then gives HOBBIT_ERR_CANCELLED; until it
 * is called every llama_decode stops, so call it too when nothing was running. */
HOBBIT_API void hobbit_session_cancel(hobbit_session * session);

/* After llama_decode failed: moves the recorded error out (and clears it). HOBBIT_OK when there was none. */
HOBBIT_API hobbit_status hobbit_session_take_error(hobbit_session * session, hobbit_error * error);

/* ---- statistics -------------------------------------------------------------------------------------- */

/* Counted per selection (one expert chosen for one token). Contract:
 *     selections == hits_high + hits_low + loads_high + loads_low + skips
 * In a batch the first selection of an expert that had to be read is the load, the others are hits. */
typedef struct hobbit_counts {
    uint64_t selections;
    uint64_t hits_high;
    uint64_t hits_low;
    uint64_t loads_high;
    uint64_t loads_low;
    uint64_t skips;
    double   mass_total; /* sum of router weights, normalised over each token's selection */
    double   mass_low;   /* of these served in low precision */
    double   mass_skipped;
    double   cost_asked;        /* sum of (a g)^2, see hobbit_session_set_sensitivity, of what may be served low */
    double   cost_low;          /* of what of it was */
    uint64_t prefetches;        /* experts whose prefetch was started */
    uint64_t prefetches_useful; /* whole before they were asked for, and asked for */
    uint64_t prefetches_late;   /* asked for while still in flight */
    uint64_t prefetches_wasted; /* aborted, or evicted without use */
    uint64_t bytes_demand;
    uint64_t bytes_prefetch;
    uint64_t bytes_wasted;   /* of bytes_prefetch */
    double   stall_seconds;  /* the first compute thread had nothing to do but wait for a read */
    double   expert_seconds; /* in the expert products, stalls taken off */
} hobbit_counts;

typedef struct hobbit_stats {
    uint32_t      struct_size;
    uint32_t      n_moe_layer;
    uint64_t      n_tokens;
    hobbit_counts total;
    uint64_t      predicted[4];       /* selections predicted d+1 layers ahead */
    uint64_t      predicted_right[4]; /* and of these truly selected */
    uint64_t      pool_bytes;
    uint64_t      slots_high;
    uint64_t      slots_low;
    uint64_t      resident_high;
    uint64_t      resident_low;
    uint32_t      direct_io;
    uint32_t      prefetch_on;    /* 1: single tokens are decoded with prefetch at the moment */
    double        prefetch_ratio; /* time of a token with prefetch over that without, in the last trial; 0: none yet */
    uint64_t      warmed;         /* experts read by hobbit_session_warm that nobody had asked for meanwhile */
    uint64_t      bytes_warmed;   /* read for it; in none of the other counts */
} hobbit_stats;

HOBBIT_API hobbit_status hobbit_session_stats(hobbit_session * session, hobbit_stats * stats, hobbit_error * error);
/* Counts of one MoE layer, 0 <= layer < n_moe_layer; `block` receives the number of the block it stands in. */
HOBBIT_API hobbit_status hobbit_session_layer_stats(hobbit_session * session, uint32_t layer, hobbit_counts * counts,
                                                    uint32_t * block, hobbit_error * error);
HOBBIT_API void          hobbit_session_reset_stats(hobbit_session * session);

/* How often each expert of a MoE layer was selected since the statistics were reset, and how often it had to be read for it: up to `n`
 * experts into `uses` and `loads` (either may be NULL). Returns the number of experts of the layer, 0 for no such layer. */
HOBBIT_API uint32_t hobbit_session_expert_uses(hobbit_session * session, uint32_t layer, uint64_t * uses, uint64_t * loads,
                                               uint32_t n);

/* ---- heat: what earlier runs used ---- */

typedef struct hobbit_heat {
    float rate;       /* uses a token, over the last hundred tokens or so, across sequences */
    float high_share; /* of its last uses, the share that needed high precision */
} hobbit_heat;

/* Heat of every expert, [n_moe_layer][n_expert], zeros where a layer has fewer: up to `n` into `heat` (may be NULL). Returns how many
 * there are; 0 before the start and for eviction rules that keep no rates (all but HOBBIT_EVICT_FORESIGHT). */
HOBBIT_API uint64_t hobbit_session_heat(hobbit_session * session, hobbit_heat * heat, uint64_t n);
/* Sets the heat to that of an earlier run, and has the hottest experts read into free slots, in high precision as long as there are such, then
 * low copies of the next: in the background, until the first token asks for experts; nothing is evicted for it. Before the first
 * token. HOBBIT_ERR_INVALID_ARGUMENT when `n` is not n_moe_layer * n_expert or a value not in 0..1, HOBBIT_ERR_UNSUPPORTED for
 * eviction rules that keep no rates, HOBBIT_ERR_STATE before the start. */
HOBBIT_API hobbit_status hobbit_session_warm(hobbit_session * session, const hobbit_heat * heat, uint64_t n,
                                             hobbit_error * error);

/* ---- time line of one token ---- */

typedef enum hobbit_event_kind {
    HOBBIT_EVENT_DECODE   = 0, /* the whole llama_decode; block is 0 */
    HOBBIT_EVENT_ROUTE    = 1, /* a layer's router has spoken: what to serve is decided, what is missing is requested */
    HOBBIT_EVENT_EXPERTS  = 2, /* one of a layer's expert products, as compute thread 0 sees it */
    HOBBIT_EVENT_STALL    = 3, /* inside of it: nothing to do but wait for a read */
    HOBBIT_EVENT_READ     = 4, /* a slice read on demand, from the request to the arrival */
    HOBBIT_EVENT_PREFETCH = 5  /* a slice read ahead, likewise */
} hobbit_event_kind;

typedef struct hobbit_event {
    uint32_t kind;  /* hobbit_event_kind */
    uint32_t block; /* N of blk.N */
    double   begin; /* seconds since the token began */
    double   end;
    uint64_t bytes; /* of a read */
} hobbit_event;

/* Switches the recording on (a few clock readings per layer) or off, and forgets what was recorded. */
HOBBIT_API void hobbit_session_timeline(hobbit_session * session, bool on);
/* Optional, around a llama_decode: then the time before the first router and after the last product belongs to the token. After
 * the end nothing of the pool is in use, so that one that shrinks gives back all. */
HOBBIT_API void hobbit_session_decode_begin(hobbit_session * session);
HOBBIT_API void hobbit_session_decode_end(hobbit_session * session);
/* Events of the last single token decoded since, or of the slowest. Returns how many there are; copies at most max_events. */
HOBBIT_API uint64_t hobbit_session_timeline_read(hobbit_session * session, bool slowest, uint64_t max_events,
                                                 hobbit_event * events);

/* Records the selections of the tokens that are decoded from now on, those of prompts too, for `hobbit trace`, `hobbit report` and
 * the tests; forgets what was recorded. `on` false: records nothing. It ends before a batch that would make it more than
 * max_tokens. With depth > 0 also what the routers of the following layers predict from each layer's router input, up to `depth` layers
 * ahead: HOBBIT_ERR_STATE with a prefetch_depth above 0. */
HOBBIT_API hobbit_status hobbit_session_trace(hobbit_session * session, bool on, uint32_t depth, uint64_t max_tokens,
                                              hobbit_error * error);
/* ids, weights: [n_rows][n_moe_layer][k], oldest first. Returns the rows available; copies at most max_rows. */
HOBBIT_API uint64_t hobbit_session_trace_read(hobbit_session * session, uint64_t max_rows, uint16_t * ids, float * weights);
/* The same, [n_rows][n_moe_layer][depth][n_predicted]: [l][d] is what was predicted for layer l from the router input of layer
 * l - 1 - d (zeros where there is no such layer), by falling score, the weights normalised over the n_predicted. */
HOBBIT_API uint64_t hobbit_session_trace_read_predictions(hobbit_session * session, uint64_t max_rows, uint16_t * ids,
                                                          float * weights);
HOBBIT_API uint32_t hobbit_session_n_predicted(const hobbit_session * session);

/* ---- inputs of the experts, for importance matrices ---- */

typedef struct hobbit_inputs {
    uint32_t         struct_size;
    uint32_t         n_expert;
    uint64_t         n_in;   /* columns of the tensor */
    const char *     name;   /* of the tensor */
    const float *    sums;   /* [n_expert][n_in]: of the squares of the inputs; NULL while they are not collected */
    const uint64_t * counts; /* [n_expert]: inputs */
    const uint16_t *
        rows; /* [n_rows][n_in], F16: the inputs since hobbit_session_decode_begin, in the order of the tokens, where all
                                experts of a token see the same (up, gate); projections of a layer share them. NULL: not kept, or not so */
    const uint16_t * selected; /* [n_rows][k]: the experts of each; 65535 where one was skipped */
    uint64_t         n_rows;
    uint32_t         k;
} hobbit_inputs;

/* Collects from now on, starting at zero, or ends and frees. Not during llama_decode. It takes 4 bytes for each expert and column; with
 * `rows` the inputs of the last llama_decode are kept too: 2 bytes for each of its tokens, layer and column. */
HOBBIT_API hobbit_status hobbit_session_collect_inputs(hobbit_session * session, bool on, bool rows, hobbit_error * error);
/* Of projection `part` (from 0) of a MoE layer. The arrays live until hobbit_session_collect_inputs is called again, and change with each
 * llama_decode. False: there is no such layer or projection. */
HOBBIT_API bool hobbit_session_inputs(const hobbit_session * session, uint32_t layer, uint32_t part, hobbit_inputs * inputs);

/* ---- probes: what this machine can give ---------------------------------------------------------------- */

typedef struct hobbit_read_probe {
    uint32_t struct_size;
    uint64_t reads;
    uint64_t bytes; /* bytes / seconds: the disk's bandwidth, bytes / reads: the size of a read */
    double   seconds;
} hobbit_read_probe;

/* Reads expert slices at random places of the model's own file(s), as the engine does, `depth` (1 to 64) at a time for about `seconds`
 * (more than 0, at most 60). `low`: the low-precision copies. The session need not be started; one that runs would be disturbed. */
HOBBIT_API hobbit_status hobbit_probe_read(hobbit_session * session, bool low, uint32_t depth, double seconds,
                                           hobbit_read_probe * probe, hobbit_error * error);

/* Bytes of weights a second in products of one token with [n_in, n_out] matrices of the type, by ggml's kernels. */
HOBBIT_API hobbit_status hobbit_probe_compute(int32_t type, int64_t n_in, int64_t n_out, uint32_t n_threads, double seconds,
                                              double * bytes_per_second, hobbit_error * error);

/* ---- recorded routing ---- */

/* Arrays as hobbit_session_trace_read and hobbit_session_trace_read_predictions give them. */
typedef struct hobbit_routing {
    uint32_t         struct_size;
    uint32_t         n_layer; /* MoE layers */
    uint32_t         k;
    uint64_t         n_rows; /* tokens */
    const uint16_t * ids;
    const float *    weights;
    uint32_t         depth; /* layers ahead, 0: without predictions */
    uint32_t         n_predicted;
    const uint16_t * predicted; /* may be NULL */
    const float *    predicted_weights;
} hobbit_routing;

/* From the next batch on the model follows `routing` (copied) instead of its routers, from the first row on: ids and weights of each
 * selection, and the predictions that prefetch goes by (without them nothing is prefetched). Rows and layers are taken modulo;
 * where a layer computes fewer tokens than the batch has, they are its last. NULL: the routers again. Not during llama_decode.
 * HOBBIT_ERR_INVALID_ARGUMENT when k differs from the model's or an expert is not there. */
HOBBIT_API hobbit_status hobbit_session_set_routing(hobbit_session * session, const hobbit_routing * routing,
                                                    hobbit_error * error);

/* ---- replay: the engine over recorded routing, without a model --------------------------------------- */

typedef struct hobbit_replay hobbit_replay;

typedef struct hobbit_replay_model {
    uint32_t     struct_size;
    uint32_t     n_expert;   /* of a layer; layers and k are those of the routing */
    uint64_t     bytes_high; /* of an expert */
    uint64_t     bytes_low;  /* 0: there are no low copies */
    const char * path;       /* not NULL: a GGUF instead of the three above; its header is read, no weights */
} hobbit_replay_model;

/* Copies `routing`. `lens`: tokens of each of the n_lens sequences, all rows of the routing. */
HOBBIT_API hobbit_replay * hobbit_replay_init(const hobbit_replay_model * model, const hobbit_routing * routing,
                                              const uint32_t * lens, uint64_t n_lens, hobbit_error * error);
HOBBIT_API void            hobbit_replay_free(hobbit_replay * replay);
/* Bytes of the largest expert, high and low precision. */
HOBBIT_API void hobbit_replay_sizes(const hobbit_replay * replay, uint64_t * bytes);

typedef struct hobbit_replay_setup {
    uint32_t struct_size;
    uint32_t by_selection; /* 1: each selection is asked for by itself and let go of, as in a textbook; exact precision only.
                               0: a layer's selections together, as the engine does it */
    uint32_t keep_uses;    /* 1: what is counted of the uses goes on from sequence to sequence */
    double   cache_share;  /* slots in bytes: this share of all experts in high precision, rounded down to whole ones */
    uint64_t pool_bytes;   /* not 0: instead of it, an expert pool as hobbit_session_start takes it */
    double   token_seconds; /* compute time of a token with all experts in memory, spread evenly over the layers */
    double   expert_share;  /* of it, in the expert products */
    double   bandwidth;     /* bytes per second; 0: every read is done at once */
    double   latency;       /* seconds of each read before its transfer; reads wait side by side, as many as io_threads */
} hobbit_replay_setup;

typedef struct hobbit_replay_result {
    uint32_t     struct_size;
    hobbit_stats stats;         /* stall_seconds and expert_seconds are not counted in it */
    double       seconds;       /* on the simulated clock */
    double       stall_seconds; /* of these with nothing to compute */
} hobbit_replay_result;

/* A new cache, the whole routing once. */
HOBBIT_API hobbit_status hobbit_replay_run(hobbit_replay * replay, const hobbit_params * params,
                                           const hobbit_replay_setup * setup, hobbit_replay_result * result,
                                           hobbit_error * error);
/* Belady's bound under the precision rule of `params`: the fewest bytes that have to be read on demand with a cache of that size (only
 * cache_share and pool_bytes count). Fills in selections, hits_high, loads_high, skips and bytes_demand. With two
 * precisions a lower bound that no cache may reach: the low copy counts as a part of the high one (csrc/replay/bound.h). */
HOBBIT_API hobbit_status hobbit_replay_bound(hobbit_replay * replay, const hobbit_params * params,
                                             const hobbit_replay_setup * setup, hobbit_replay_result * result,
                                             hobbit_error * error);

/* ---- quantisation, by ggml's code, and ours for IQ4_NL ----------------------------------------------- */

typedef struct hobbit_type_info {
    uint32_t     struct_size;
    uint32_t     block; /* elements */
    uint32_t     block_bytes;
    uint32_t     needs_imatrix; /* 1: quantising to it is impossible without an importance matrix */
    uint32_t     computable;    /* 1: ggml can multiply by a matrix of this type (MUL_MAT_ID on the CPU) */
    const char * name;          /* as llama.cpp prints it: "q8_0" */
} hobbit_type_info;

/* False for an unknown type. */
HOBBIT_API bool hobbit_type(int32_t type, hobbit_type_info * info);

/* n_rows x n_per_row floats -> `dst` (n_rows rows of the type). Safe to call from several threads on disjoint rows after
 * hobbit_quantize_init(type). `imatrix`: NULL or n_per_row weights, finite and not below 0. */
HOBBIT_API void          hobbit_quantize_init(int32_t type);
HOBBIT_API hobbit_status hobbit_quantize(int32_t type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                                         const float * imatrix, hobbit_error * error);
/* The same, and what is rounded away in a block of columns is made good in the columns after it, as far as these go together with
 * them in the inputs (csrc/ggml/error-feedback.h). `factor`: R, [n_per_row][n_per_row], upper triangular, its diagonal above 1e-15, nothing
 * beyond 1e15, for which R R^T is the matrix of second moments of the inputs; it says how much each column counts as well. */
HOBBIT_API hobbit_status hobbit_quantize_feedback(int32_t type, const float * src, void * dst, int64_t n_rows,
                                                  int64_t n_per_row, const float * factor, hobbit_error * error);
HOBBIT_API hobbit_status hobbit_dequantize(int32_t type, const void * src, float * dst, int64_t n, hobbit_error * error);

#ifdef __cplusplus
}
#endif

#endif /* HOBBIT_H */
