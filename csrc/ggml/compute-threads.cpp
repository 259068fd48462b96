#include "compute-threads.h"

#include "ggml-cpu.h"
#include "llama.h"

#include <algorithm>

namespace hobbit {

std::shared_ptr<void> attach_threads(void * context) {
    auto *    ctx = (llama_context *) context;
    const int n   = std::max(llama_n_threads(ctx), llama_n_threads_batch(ctx));
    if (n < 2) {
        return nullptr;
    }
    ggml_threadpool_params params = ggml_threadpool_params_default(n);
    params.poll                   = 0;  // between two graphs they sleep
    ggml_threadpool * pool        = ggml_threadpool_new(&params);
    llama_attach_threadpool(ctx, pool, pool);
    return { pool, [](void * p) { ggml_threadpool_free((ggml_threadpool *) p); } };
}

}  // namespace hobbit
