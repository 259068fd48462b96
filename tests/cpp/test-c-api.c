/* The C API read by a C compiler, and called. */
#include "hobbit.h"

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
    return failed != 0;
}
