// The reader threads: the only threads that read expert data.
//
// Two queues. Demand requests are what compute threads wait for and always go first, large ones in pieces, so that what was asked for
// first is there first instead of everything at the end. Prefetch requests start only when no demand request is queued and the last few
// of them are running, at most `max_prefetch` at a time. They are read block by block, and between two blocks stop when cancelled and
// stand back when demand requests have come in.
#pragma once

#include "reader.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hobbit {

class io_pool final : public reader {
  public:
    // Bytes of a piece of a large demand request.
    static constexpr uint64_t PIECE = (uint64_t) 4 << 20;

    // `on_end` is called on a reader thread. Throws HOBBIT_ERR_NO_MEMORY when the system refuses a thread.
    io_pool(uint32_t n_threads, uint64_t block_bytes, uint32_t max_prefetch, handler on_end);
    ~io_pool() override;

    void                    demand(const std::vector<io_request> & requests) override;
    void                    prefetch(const std::vector<io_request> & requests) override;
    void                    promote(const void * owner) override;
    std::vector<io_request> withdraw(const void * owner) override;

    uint32_t demand_pending() const override { return n_demand_.load(std::memory_order_relaxed); }

    void set_max_prefetch(uint32_t n) override;
    void drain() override;
    void stop() override;

  private:
    // A demand request that is read in pieces, by several threads.
    struct pieces {
        io_request         whole;
        uint32_t           left = 0;  // not read yet; guarded by mutex_
        std::exception_ptr why;       // of the first that failed; likewise
    };

    // All of a request, or a piece of it.
    struct queued {
        io_request              request;
        std::shared_ptr<pieces> of;
    };

    // Under the mutex.
    void push_demand(const io_request & request);
    // A piece was read; true for the last one, which ends the request.
    bool end_piece(pieces & of, std::exception_ptr & why);
    void run();
    // For a thread that comes now. Whoever takes a request wakes another thread if there is more, and looks again when it is done:
    // so one is woken for what is new, and nobody in vain. Under the mutex.
    bool has_work() const;
    // No demand request is queued, the last few of them are running, and nobody waits for the end of all reads.
    bool prefetch_may_run() const;
    // For a running prefetch, between two blocks.
    bool must_stand_back();
    // Reads block by block; false: a demand request came in between, `request.done` says how far it got.
    bool read_prefetch(io_request & request, io_outcome & outcome);

    const uint64_t        block_;
    std::atomic<uint32_t> max_prefetch_;
    const handler         on_end_;

    std::mutex              mutex_;  // guards those below, but for n_demand_ and threads_
    std::condition_variable work_;
    std::condition_variable idle_;
    std::deque<queued>      demand_;
    std::deque<io_request>  prefetch_;
    uint32_t                n_prefetching_ = 0;
    uint32_t                n_running_     = 0;
    uint32_t                n_draining_    = 0;  // callers of drain()
    bool                    stop_          = false;

    std::atomic<uint32_t>    n_demand_ { 0 };  // queued and running
    std::vector<std::thread> threads_;
};

}  // namespace hobbit
