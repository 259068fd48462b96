// Any bytes as a model: expert_index takes them or says why not.
#include "fuzz-file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz::open_index(fuzz::memory_file(data, size).path(), "");
    return 0;
}
