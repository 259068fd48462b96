// base/placement.h: compute threads that share a processor part, and may go anywhere afterwards.
#include "base/placement.h"

#include "test.h"

#if defined(__linux__)

#    include <sched.h>

#    include <thread>
#    include <vector>

using hobbit::placement;

namespace {

cpu_set_t affinity() {
    cpu_set_t set;
    CPU_ZERO(&set);
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    return set;
}

std::vector<int> processors() {
    const cpu_set_t  set = affinity();
    std::vector<int> out;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set)) {
            out.push_back(cpu);
        }
    }
    return out;
}

// Puts the calling thread on `cpu`. It stays there as long as it is not allowed elsewhere.
void go_to(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
}

// What settle() says to thread `i` of `n` on `cpu`, allowed on `allowed`. It runs in a thread of its own, at once after it was let go.
bool settles(placement & places, int i, int n, int cpu, cpu_set_t allowed, cpu_set_t * afterwards = nullptr) {
    bool moved = false;
    std::thread([&] {
        go_to(cpu);
        sched_setaffinity(0, sizeof(allowed), &allowed);
        moved = places.settle(i, n);
        if (afterwards != nullptr) {
            *afterwards = affinity();
        }
    }).join();
    return moved;
}

cpu_set_t only(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return set;
}

}  // namespace

TEST("of two threads on one processor the second moves, and its affinity is as before") {
    const std::vector<int> cpus = processors();
    if (cpus.size() < 2) {
        std::printf("  not run: there is one processor\n");
        return;
    }
    cpu_set_t two = only(cpus[0]);
    CPU_SET(cpus[1], &two);
    // The kernel may move a thread between two lines: then the two did not share, which is what is asked for.
    bool moved = false;
    for (int attempt = 0; attempt < 100 && !moved; ++attempt) {
        placement places;
        settles(places, 0, 2, cpus[0], only(cpus[0]));
        cpu_set_t after = only(cpus[0]);
        moved           = settles(places, 1, 2, cpus[0], two, &after);
        CHECK(CPU_EQUAL(&after, &two));
    }
    CHECK(moved);
}

TEST("threads on processors of their own stay") {
    const std::vector<int> cpus = processors();
    if (cpus.size() < 2) {
        std::printf("  not run: there is one processor\n");
        return;
    }
    placement places;
    CHECK(!settles(places, 0, 2, cpus[0], only(cpus[0])));
    CHECK(!settles(places, 1, 2, cpus[1], only(cpus[1])));
}

TEST("where there is no processor to move to they stay") {
    const int cpu = processors()[0];
    placement places;
    CHECK(!settles(places, 0, 2, cpu, only(cpu)));
    CHECK(!settles(places, 1, 2, cpu, only(cpu)));
    CHECK(!settles(places, 5, 1000, cpu, only(cpu)));  // more than are kept count of
}

#else

TEST("nothing moves where it is not known how") {
    hobbit::placement places;
    CHECK(!places.settle(1, 2));
}

#endif

TEST_MAIN()
