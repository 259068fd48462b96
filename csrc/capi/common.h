// What the functions of the C API share: they check arguments, turn exceptions into statuses, and do nothing else.
#pragma once

#include "../base/error.h"
#include "../engine/session.h"
#include "../hobbit.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

struct hobbit_session {
    std::shared_ptr<hobbit::session> core;
    std::shared_ptr<void>            threads;  // of the context
};

namespace hobbit {

// Runs `body`; its exceptions become a status and fill `error`.
template <typename F>
hobbit_status guarded(hobbit_error * error, F && body) {
    try {
        body();
        return HOBBIT_OK;
    } catch (const hobbit::error & e) {
        fill_error(error, e.status(), e.os_errno(), e.what());
        return e.status();
    } catch (const std::bad_alloc &) {
        fill_error(error, HOBBIT_ERR_NO_MEMORY, 0, "out of memory");
        return HOBBIT_ERR_NO_MEMORY;
    } catch (const std::exception & e) {
        fill_error(error, HOBBIT_ERR_INTERNAL, 0, e.what());
        return HOBBIT_ERR_INTERNAL;
    } catch (...) {
        fill_error(error, HOBBIT_ERR_INTERNAL, 0, "unknown exception");
        return HOBBIT_ERR_INTERNAL;
    }
}

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
