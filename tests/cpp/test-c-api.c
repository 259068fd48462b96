/* The C API read by a C compiler, and called. */
#include "hobbit.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

static int failed = 0;

static void check(int ok, const char * claim) {
    printf("%s  %s\n", ok ? "ok    " : "FAILED", claim);
    failed += !ok;
}

int main(void) {
    check(hobbit_abi_version() == HOBBIT_ABI_VERSION, "the library has the ABI of the header");
    check(strlen(hobbit_version()) > 0, "the library says its version");
    check(strlen(hobbit_upstream_commit()) > 0, "the library says what llama.cpp it was built from");
    check(strcmp(hobbit_patches(), hobbit_loaded_patches()) == 0, "the loaded libllama has our patches");

    char         text[128] = "";
    hobbit_error error     = { 0 };
    check(hobbit_fingerprint("nowhere.gguf", text, sizeof(text), &error) == HOBBIT_ERR_FILE && error.os_errno != 0,
          "there is no fingerprint of a file that is not there");
    check(hobbit_fingerprint(NULL, text, sizeof(text), NULL) == HOBBIT_ERR_INVALID_ARGUMENT, "or of none");

    /* Structs of an older caller are shorter: what they do not have is as it was before there was a field for it. */
    const uint16_t      ids[]     = { 0, 1, 1, 0 };
    const float         weights[] = { 1, 1, 1, 1 };
    const uint32_t      lens[]    = { 4 };
    hobbit_replay_model model     = { sizeof(model), 2, 4096, 0, "nowhere.gguf" };
    hobbit_routing      routing   = { sizeof(routing), 1, 1, 4, ids, weights, 4, 1, NULL, NULL };
    model.struct_size             = offsetof(hobbit_replay_model, path);
    routing.struct_size           = offsetof(hobbit_routing, depth);
    hobbit_replay * replay        = hobbit_replay_init(&model, &routing, lens, 1, &error);
    check(replay != NULL, "a model without a path and a routing without predictions are read as far as they go");

    hobbit_params        params = { 0 };
    hobbit_replay_setup  setup  = { 0 };
    hobbit_replay_result result = { 0 };
    params.struct_size          = sizeof(params);
    result.struct_size          = sizeof(result);
    check(hobbit_params_init(&params, "lru", &error) == HOBBIT_OK, "there is a mode lru");
    setup.cache_share = 1.0;
    setup.latency     = -1.0;
    setup.struct_size = offsetof(hobbit_replay_setup, latency);
    check(hobbit_replay_run(replay, &params, &setup, &result, &error) == HOBBIT_OK && result.stats.total.loads_high == 2,
          "and so is a setup");
    setup.struct_size = 0;
    check(hobbit_replay_run(replay, &params, &setup, &result, &error) == HOBBIT_ERR_INVALID_ARGUMENT &&
              strstr(error.message, "setup") != NULL,
          "one without its size is named");
    check(hobbit_replay_run(replay, NULL, &setup, &result, &error) == HOBBIT_ERR_INVALID_ARGUMENT, "one that is NULL too");
    hobbit_replay_free(replay);
    return failed != 0;
}
