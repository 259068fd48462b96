// Errors inside the core: one exception type that carries what hobbit_error needs. The C API turns it into a status; nothing
// else catches it, except threads, which keep it for the caller.
#pragma once

#include "../hobbit.h"

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
// Appends strerror(os_errno).
[[noreturn]] void fail_os(hobbit_status status, int os_errno, const std::string & message);

// Copies into the caller's struct; a NULL `out` is fine.
void fill_error(hobbit_error * out, hobbit_status status, int os_errno, const std::string & message);

}  // namespace hobbit
