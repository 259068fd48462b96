#include "context-memory.h"

#include "../base/error.h"
#include "../base/memory.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-ext.h"

// upstream, private
#include "llama-context.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace hobbit {

uint64_t resident_bytes(const llama_context * context) {
    uint64_t sum = 0;
    for (const auto & item : llama_get_memory_breakdown(context)) {
        if (strcmp(ggml_backend_buft_name(item.first), "HOBBIT") != 0) {
            sum += item.second.model + item.second.context;
        }
    }
    return sum;
}

// Bytes of each compute buffer that a graph which is laid out reaches to.
static std::unordered_map<ggml_backend_buffer_t, size_t> laid_out(ggml_cgraph * graph) {
    std::unordered_map<ggml_backend_buffer_t, size_t> ends;
    const auto                                        visit = [&](const ggml_tensor * t) {
        if (t == nullptr || t->buffer == nullptr || t->view_src != nullptr || !ggml_backend_buffer_is_host(t->buffer) ||
            ggml_backend_buffer_get_usage(t->buffer) != GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
            return;
        }
        const char * end = (const char *) t->data + ggml_backend_buffer_get_alloc_size(t->buffer, t);
        size_t &     to = ends[t->buffer];
        to = std::max(to, (size_t) (end - (const char *) ggml_backend_buffer_get_base(t->buffer)));
    };
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        visit(node);
        for (const ggml_tensor * source : node->src) {
            visit(source);
        }
    }
    return ends;
}

batch_bytes fit_batches(llama_context * context, uint32_t n_tokens, uint32_t n_outputs) {
    context->sched_reserve();  // what it has put off, a new scheduler at worst, would undo this at the next llama_decode
    const auto &                   cparams = context->get_cparams();
    ggml_backend_sched_t           sched   = context->get_sched();
    const llama_memory_t           memory  = context->get_memory();
    const llama_memory_context_ptr full    = memory != nullptr ? memory->init_full() : nullptr;
    const uint32_t                 n       = std::clamp(n_tokens, 1u, std::min(context->n_ctx(), context->n_ubatch()));
    const bool                     loaded  = !context->get_model().hparams.no_alloc;
    std::vector<size_t>            sizes(ggml_backend_sched_get_n_backends(sched));

    // llama.cpp rounds the tokens up to a multiple of the sequences, of which embeddings have as many as a batch has tokens, and its
    // pooling ends the process where the outputs are fewer.
    const uint32_t most_seqs = std::min(n, cparams.n_seq_max);
    const uint32_t n_seqs    = n % most_seqs == 0 ? most_seqs : 1;
    ggml_cgraph *  graph = context->graph_reserve(n, n_seqs, std::min({ n, n_outputs, cparams.n_outputs_max }), full.get(),
                                                  !loaded, loaded ? nullptr : sizes.data());
    if (graph == nullptr) {
        fail(HOBBIT_ERR_NO_MEMORY, "no memory for the compute buffers of " + std::to_string(n) + " tokens");
    }
    batch_bytes out;
    out.work = ggml_graph_plan(graph, (int) context->n_threads_batch(), nullptr).work_size;
    if (!loaded) {
        for (const size_t size : sizes) {
            out.buffers += size;
        }
        return out;
    }
    // Where the buffers lie only their tensors say.
    if (!ggml_backend_sched_alloc_graph(sched, graph)) {
        fail(HOBBIT_ERR_NO_MEMORY, "no memory for the compute buffers of " + std::to_string(n) + " tokens");
    }
    for (const auto & [buffer, end] : laid_out(graph)) {
        out.buffers += end;
        void * const base = ggml_backend_buffer_get_base(buffer);
        const size_t size = ggml_backend_buffer_get_size(buffer);
        release_pages(base, size);
        // Of the last layout: were a token's tensors scattered over it (llama.cpp lays out again to shift a context), each would take 2 MiB.
        prefer_small_pages(base, size);
        prefer_large_pages(base, end);
    }
    ggml_backend_sched_reset(sched);
    return out;
}

}  // namespace hobbit
