// Reads expert data: what the expert store asks, whoever answers.
#pragma once

#include "file.h"

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <vector>

namespace hobbit {

// Demand reads that may still be running when prefetches begin: fewer than it takes to keep a disk busy. Together with four prefetches
// in flight this gave, interleaved in one process, 0.81 to 0.89 of the time a token takes without prefetch; waiting for the last one,
// with two in flight, 0.89 to 1.00.
constexpr uint32_t DEMAND_TAIL = 2;

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

// Reads what lies at `what` into the room at `dst`, with what has to be read around it.
inline io_request request_of(const file & src, const extent & what, std::byte * dst) {
    const file::range r = src.around(what.offset, what.bytes);
    io_request        out;
    out.src       = &src;
    out.offset    = r.begin;
    out.bytes     = r.bytes;
    out.must_have = r.must_have;
    out.dst       = dst;
    return out;
}

inline bool is_set(const std::atomic<bool> * flag) { return flag != nullptr && flag->load(std::memory_order_relaxed); }

enum class io_outcome { done, cancelled, failed };

// Takes the requests of `owner` out of a queue, the others keep their order.
template <typename Queue>
std::vector<io_request> take_requests_of(const void * owner, Queue & queue) {
    std::vector<io_request> taken;
    for (auto it = queue.begin(); it != queue.end();) {
        if (it->owner == owner) {
            taken.push_back(*it);
            it = queue.erase(it);
        } else {
            ++it;
        }
    }
    return taken;
}

class reader {
  public:
    // Called once per request, with no lock of the reader held. `why` is set for io_outcome::failed.
    using handler = std::function<void(const io_request &, io_outcome, std::exception_ptr why)>;

    virtual ~reader() = default;

    // Never block. The order within a call is kept.
    virtual void demand(const std::vector<io_request> & requests)   = 0;
    virtual void prefetch(const std::vector<io_request> & requests) = 0;

    // Moves the owner's queued prefetch requests to the demand queue.
    virtual void promote(const void * owner) = 0;
    // Takes the owner's queued prefetch requests out and returns them; running ones go on.
    virtual std::vector<io_request> withdraw(const void * owner) = 0;

    // Reads running or queued as demand right now.
    virtual uint32_t demand_pending() const = 0;

    virtual void set_max_prefetch(uint32_t n) = 0;

    // Until no read is running and no demand read is queued. Meanwhile no prefetch begins.
    virtual void drain() = 0;
    // For good: lets running reads finish; what is queued, and what comes later, is dropped without a call of the handler.
    virtual void stop() = 0;
};

}  // namespace hobbit
