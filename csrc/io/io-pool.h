// The reader threads: the only threads that read expert data.
//
// Two queues. Demand requests are what compute threads wait for and always go first. Prefetch requests start only
// when no demand request is queued, at most `max_prefetch` at a time, are read block by block, and between two blocks stop
// when cancelled and stand back when a demand request has come in.
#pragma once

#include "file.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace hobbit {

struct io_request {
    const file *              src       = nullptr;
    uint64_t                  offset    = 0;  // aligned range, see file::read
    uint64_t                  bytes     = 0;
    uint64_t                  must_have = 0;
    std::byte *               dst       = nullptr;
    void *                    owner     = nullptr;  // whom the read is for; never dereferenced here
    uint32_t                  part      = 0;        // which of the owner's parts
    const std::atomic<bool> * cancel    = nullptr;  // prefetch: stop at the next block. NULL: never
    const std::atomic<bool> * urgent    = nullptr;  // prefetch: somebody waits for it by now, do not stand back. NULL: never
    uint64_t                  done      = 0;        // bytes already there, of a request that stood back
};

enum class io_outcome { done, cancelled, failed };

class io_pool {
  public:
    // Called on a reader thread, with no lock of the pool held, once per request. `why` is set for io_outcome::failed.
    using handler = std::function<void(const io_request &, io_outcome, std::exception_ptr why)>;

    io_pool(uint32_t n_threads, uint64_t block_bytes, uint32_t max_prefetch, handler on_end);
    // Lets running reads finish; what is still queued is dropped without a call of the handler.
    ~io_pool();

    // Never block. The order within a call is kept.
    void demand(const std::vector<io_request> & requests);
    void prefetch(const std::vector<io_request> & requests);

    // Moves the owner's queued prefetch requests to the demand queue.
    void promote(const void * owner);
    // Takes the owner's queued prefetch requests out and returns their parts as bits; running ones go on.
    uint32_t withdraw(const void * owner);

    // Reads running or queued as demand right now.
    uint32_t demand_pending() const { return n_demand_.load(std::memory_order_relaxed); }

    void set_max_prefetch(uint32_t n);

    // Sleeps until no read is running and no demand read is queued.
    void drain();

  private:
    void run();
    // Reads block by block; false: a demand request came in between, `request.done` says how far it got.
    bool read_prefetch(io_request & request, io_outcome & outcome);

    const uint64_t        block_;
    std::atomic<uint32_t> max_prefetch_;
    const handler         on_end_;

    std::mutex              mutex_;  // guards the six below
    std::condition_variable work_;
    std::condition_variable idle_;
    std::deque<io_request>  demand_;
    std::deque<io_request>  prefetch_;
    uint32_t                n_prefetching_ = 0;
    uint32_t                n_running_     = 0;
    bool                    stop_          = false;

    std::atomic<uint32_t>    n_demand_ { 0 };
    std::vector<std::thread> threads_;
};

}  // namespace hobbit
