// Compute threads that share a processor part.
//
// ggml's threads spin at a barrier after every node of a graph. Two of them on one processor take turns, a time slice of some 4 ms each,
// until the kernel's balancing looks: a hundred nodes' worth. It comes about where threads sleep in between, as ours do for reads: whoever
// wakes them has a processor too. Two threads on two processors met 0.3 times a token, for some 8 ms each; with four readers in place of
// eight 3 times, and a token took 1.5 times as long.
#pragma once

#include <atomic>
#include <cstddef>

namespace hobbit {

class placement {
  public:
    // By each of `n` compute threads, `i` its number, now and then: notes the processor it is on, and when one with a smaller number was
    // last seen there, moves to another that it may run on and where none of them is. True when it moved. Leaves the threads' affinity as it
    // was: the kernel remains free to move them.
    bool settle(int i, int n);

  private:
    static constexpr size_t MAX_THREADS = 256;

    std::atomic<int> last_[MAX_THREADS] = {};  // processor + 1, 0: not seen yet
};

}  // namespace hobbit
