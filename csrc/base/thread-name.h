// The name of a thread: what top, a debugger and `hobbit bench` tell our threads apart by.
#pragma once

#if defined(__linux__)
#    include <pthread.h>
#endif

namespace hobbit {

// Of the calling thread. At most 15 characters.
inline void name_thread(const char * name) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), name);
#else
    (void) name;
#endif
}

}  // namespace hobbit
