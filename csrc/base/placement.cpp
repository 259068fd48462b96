#include "placement.h"

#if defined(__linux__)
#    include <sched.h>
#endif

namespace hobbit {

bool placement::settle(int i, int n) {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || i >= n || n > (int) MAX_THREADS) {
        return false;
    }
    last_[i].store(here + 1, std::memory_order_relaxed);
    bool shared = false;
    for (int j = 0; j < i; ++j) {
        shared = shared || last_[j].load(std::memory_order_relaxed) == here + 1;
    }
    if (!shared) {
        return false;
    }
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return false;  // more processors than a cpu_set_t has bits
    }
    cpu_set_t free = allowed;
    for (int j = 0; j < n; ++j) {
        if (const int cpu = last_[j].load(std::memory_order_relaxed); cpu > 0) {
            CPU_CLR(cpu - 1, &free);
        }
    }
    if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof(free), &free) != 0) {
        return false;  // more threads than processors
    }
    sched_setaffinity(0, sizeof(allowed), &allowed);
    last_[i].store(sched_getcpu() + 1, std::memory_order_relaxed);
    return true;
#else
    (void) i;
    (void) n;
    return false;
#endif
}

}  // namespace hobbit
