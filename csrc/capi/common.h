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

// The caller's struct that begins with struct_size; what its version of it does not have yet is as in `defaults`.
template <typename T>
T copy_in(const T * from, const char * name, T defaults = {}) {
    require(from != nullptr && from->struct_size >= sizeof(uint32_t),
            format("%s is NULL, or its struct_size is not set", name));
    memcpy(&defaults, from, std::min<size_t>(from->struct_size, sizeof(T)));
    return defaults;
}

// Copies a struct that begins with struct_size to a caller whose version of it may be shorter.
template <typename T>
void copy_out(T * to, T from) {
    require(to != nullptr && to->struct_size >= sizeof(uint32_t), "struct_size is not set");
    const uint32_t size = to->struct_size;
    from.struct_size    = size;
    memcpy(to, &from, std::min<size_t>(size, sizeof(T)));
}

hobbit_params params_of(const hobbit_params * params);

}  // namespace hobbit
