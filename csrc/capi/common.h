// What the functions of the C API share: they check arguments, turn exceptions into statuses, and do nothing else.
#pragma once

#include "../base/error.h"
#include "../engine/session.h"
#include "../hobbit.h"

#include <algorithm>
#include <cstring>
#include <memory>

struct hobbit_session {
    std::shared_ptr<hobbit::session> core;
    std::shared_ptr<void>            threads;  // of the context
};

namespace hobbit {

inline void require(bool ok, const char * message) {
    if (!ok) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, message);
    }
}

// Copies a struct that begins with struct_size to a caller whose version of it may be shorter.
template <typename T>
void copy_out(T * to, T from) {
    require(to != nullptr && to->struct_size >= sizeof(uint32_t), "struct_size is not set");
    const uint32_t size = to->struct_size;
    from.struct_size    = size;
    memcpy(to, &from, std::min<size_t>(size, sizeof(T)));
}

// The caller's parameters; what its version of the struct does not have yet is the default.
hobbit_params params_of(const hobbit_params * params);

}  // namespace hobbit
