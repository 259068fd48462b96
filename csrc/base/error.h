// Errors inside the core: one exception type that carries what hobbit_error needs. The C API turns it into a status (guarded);
// nothing else catches it, except threads, which keep it for the caller.
#pragma once

#include "../hobbit.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace hobbit {

class error : public std::runtime_error {
  public:
    error(hobbit_status status, int os_errno, const std::string & message) :
        std::runtime_error(message), status_(status), os_errno_(os_errno) {}

    hobbit_status status() const { return status_; }

    int os_errno() const { return os_errno_; }

  private:
    hobbit_status status_;
    int           os_errno_;
};

// printf into a std::string.
std::string format(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

// "1.4 GiB": for messages.
std::string human_bytes(unsigned long long bytes);

[[noreturn]] void fail(hobbit_status status, const std::string & message);

// Of what a caller gives.
inline void require(bool ok, const std::string & message) {
    if (!ok) {
        fail(HOBBIT_ERR_INVALID_ARGUMENT, message);
    }
}

// Appends strerror(os_errno).
[[noreturn]] void fail_os(hobbit_status status, int os_errno, const std::string & message);

// Copies into the caller's struct; a NULL `out` is fine.
void fill_error(hobbit_error * out, hobbit_status status, int os_errno, const std::string & message);

// Runs `body`; its exceptions become a status and fill `out`.
template <typename F>
hobbit_status guarded(hobbit_error * out, F && body) {
    try {
        body();
        return HOBBIT_OK;
    } catch (const error & e) {
        fill_error(out, e.status(), e.os_errno(), e.what());
        return e.status();
    } catch (const std::bad_alloc &) {
        fill_error(out, HOBBIT_ERR_NO_MEMORY, 0, "out of memory");
        return HOBBIT_ERR_NO_MEMORY;
    } catch (const std::exception & e) {
        fill_error(out, HOBBIT_ERR_INTERNAL, 0, e.what());
        return HOBBIT_ERR_INTERNAL;
    } catch (...) {
        fill_error(out, HOBBIT_ERR_INTERNAL, 0, "unknown exception");
        return HOBBIT_ERR_INTERNAL;
    }
}

}  // namespace hobbit
