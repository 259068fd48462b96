// Any bytes as the low-precision copies of a good model. The corpus does not know the model's fingerprint: where it has the
// placeholder, "sha256:" and 64 zeros, the right one is put in.
#include "../cpp/tiny-gguf.h"
#include "fuzz-file.h"
#include "io/fingerprint.h"

#include <algorithm>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const test::temp_folder folder;
    static const std::string       model = [] {
        test::tiny_model m;
        m.n_layer = 2, m.n_expert = 4, m.n_in = 32, m.n_out = 4, m.low = false;
        m.write(folder.path("model.gguf"));
        return folder.path("model.gguf");
    }();
    static const std::string right       = hobbit::fingerprint(hobbit::expert_index(model, "", false));
    static const std::string placeholder = "sha256:" + std::string(64, '0');

    std::string input((const char *) data, size);
    const auto  at = std::search(input.begin(), input.end(), placeholder.begin(), placeholder.end());
    if (at != input.end()) {
        std::copy(right.begin(), right.end(), at);
    }
    fuzz::open_index(model, fuzz::memory_file((const uint8_t *) input.data(), input.size()).path());
    return 0;
}
