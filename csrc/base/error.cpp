#include "error.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace hobbit {

std::string format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    va_list again;
    va_copy(again, args);
    const int n = vsnprintf(nullptr, 0, fmt, args);
    va_end(args);
    std::string out(n > 0 ? (size_t) n : 0, '\0');
    if (n > 0) {
        vsnprintf(&out[0], out.size() + 1, fmt, again);
    }
    va_end(again);
    return out;
}

std::string human_bytes(unsigned long long bytes) {
    if (bytes < (1ull << 20)) {
        return format("%.1f KiB", (double) bytes / 1024.0);
    }
    if (bytes < (1ull << 30)) {
        return format("%.1f MiB", (double) bytes / (1 << 20));
    }
    return format("%.2f GiB", (double) bytes / (1 << 30));
}

void fail(hobbit_status status, const std::string & message) { throw error(status, 0, message); }

void fail_os(hobbit_status status, int os_errno, const std::string & message) {
    throw error(status, os_errno, message + ": " + strerror(os_errno));
}

void fill_error(hobbit_error * out, hobbit_status status, int os_errno, const std::string & message) {
    if (out == nullptr) {
        return;
    }
    out->status   = status;
    out->os_errno = os_errno;
    snprintf(out->message, sizeof(out->message), "%s", message.c_str());
}

}  // namespace hobbit
