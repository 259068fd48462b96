#include "io-pool.h"

#include "../base/error.h"
#include "../base/thread-name.h"

#include <algorithm>
#include <system_error>

namespace hobbit {

io_pool::io_pool(uint32_t n_threads, uint64_t block_bytes, uint32_t max_prefetch, handler on_end) :
    block_(align_up(std::max<uint64_t>(block_bytes, PAGE), PAGE)), max_prefetch_(max_prefetch), on_end_(std::move(on_end)) {
    threads_.reserve(n_threads);
    try {
        for (uint32_t i = 0; i < n_threads; ++i) {
            threads_.emplace_back([this] { run(); });
        }
    } catch (const std::system_error & e) {
        const size_t started = threads_.size();
        stop();
        fail_os(HOBBIT_ERR_NO_MEMORY, e.code().value(),
                format("cannot start reader thread %zu of %u (io_threads)", started + 1, n_threads));
    }
}

io_pool::~io_pool() { stop(); }

void io_pool::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        demand_.clear();
        prefetch_.clear();
    }
    work_.notify_all();
    for (auto & thread : threads_) {
        thread.join();
    }
    threads_.clear();
}

void io_pool::demand(const std::vector<io_request> & requests) {
    if (requests.empty()) {
        return;
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (const io_request & r : requests) {
            push_demand(r);
        }
    }
    // One is woken, and each that takes work wakes the next while there is more: the caller is not kept, and no thread wakes for nothing.
    work_.notify_one();
}

void io_pool::push_demand(const io_request & request) {
    if (request.bytes - request.done <= 2 * PIECE) {
        demand_.push_back({ request, nullptr });
        n_demand_.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    auto of    = std::make_shared<pieces>();
    of->whole  = request;
    uint32_t n = 0;
    for (uint64_t at = request.done; at < request.bytes; at += PIECE) {
        io_request r = request;
        r.offset += at;
        r.dst += at;
        r.bytes     = std::min(PIECE, request.bytes - at);
        r.must_have = request.must_have > at ? std::min(r.bytes, request.must_have - at) : 0;
        r.done      = 0;
        demand_.push_back({ r, of });
        n++;
    }
    of->left = n;  // nobody looks before the mutex is free
    n_demand_.fetch_add(n, std::memory_order_relaxed);
}

bool io_pool::end_piece(pieces & of, std::exception_ptr & why) {
    std::lock_guard<std::mutex> lock(mutex_);
    of.why = of.why ? of.why : why;
    why    = of.why;
    return --of.left == 0;
}

void io_pool::prefetch(const std::vector<io_request> & requests) {
    if (requests.empty()) {
        return;
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        prefetch_.insert(prefetch_.end(), requests.begin(), requests.end());
    }
    if (demand_pending() <= DEMAND_TAIL) {  // else whoever ends a demand read looks here next
        work_.notify_one();
    }
}

void io_pool::set_max_prefetch(uint32_t n) {
    if (max_prefetch_.exchange(n, std::memory_order_relaxed) < n) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
        }
        work_.notify_one();
    }
}

void io_pool::drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    n_draining_++;
    idle_.wait(lock, [this] { return n_running_ == 0 && demand_.empty(); });
    n_draining_--;
    work_.notify_one();
}

void io_pool::promote(const void * owner) {
    std::vector<io_request> moved;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        moved = take_requests_of(owner, prefetch_);
    }
    demand(moved);
}

std::vector<io_request> io_pool::withdraw(const void * owner) {
    std::lock_guard<std::mutex> lock(mutex_);
    return take_requests_of(owner, prefetch_);
}

bool io_pool::read_prefetch(io_request & r, io_outcome & outcome) {
    while (r.done < r.bytes) {
        if (is_set(r.cancel) && !is_set(r.urgent)) {
            outcome = io_outcome::cancelled;
            return true;
        }
        if (must_stand_back() && !is_set(r.urgent)) {
            return false;
        }
        const uint64_t n    = std::min(block_, r.bytes - r.done);
        const uint64_t must = r.must_have > r.done ? std::min(n, r.must_have - r.done) : 0;
        r.src->read(r.dst + r.done, r.offset + r.done, n, must);
        r.done += n;
    }
    outcome = io_outcome::done;
    return true;
}

bool io_pool::must_stand_back() {
    std::lock_guard<std::mutex> lock(mutex_);
    return !prefetch_may_run();
}

bool io_pool::prefetch_may_run() const { return demand_.empty() && demand_pending() <= DEMAND_TAIL && n_draining_ == 0; }

bool io_pool::has_work() const {
    return !demand_.empty() ||
           (!prefetch_.empty() && n_prefetching_ < max_prefetch_.load(std::memory_order_relaxed) && prefetch_may_run());
}

void io_pool::run() {
    name_thread("hobbit-read");
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        work_.wait(lock, [this] { return stop_ || has_work(); });
        if (stop_) {
            return;
        }
        const bool is_demand = !demand_.empty();
        io_request request   = is_demand ? demand_.front().request : prefetch_.front();
        const auto of        = is_demand ? demand_.front().of : nullptr;
        is_demand ? demand_.pop_front() : prefetch_.pop_front();
        n_prefetching_ += is_demand ? 0 : 1;
        n_running_++;
        const bool more = has_work();
        lock.unlock();
        if (more) {
            work_.notify_one();
        }

        io_outcome         outcome = io_outcome::done;
        std::exception_ptr why;
        bool               ended = true;
        try {
            if (is_demand) {
                const uint64_t must = request.must_have > request.done ? request.must_have - request.done : 0;
                request.src->read(request.dst + request.done, request.offset + request.done, request.bytes - request.done,
                                  must);
            } else {
                ended = read_prefetch(request, outcome);
            }
        } catch (...) {
            outcome = io_outcome::failed;
            why     = std::current_exception();
        }
        if (of != nullptr) {
            ended   = end_piece(*of, why);
            request = of->whole;
            outcome = why ? io_outcome::failed : io_outcome::done;
        }
        if (ended) {
            on_end_(request, outcome, why);
        }

        lock.lock();
        n_running_--;
        idle_.notify_all();
        if (is_demand) {
            n_demand_.fetch_sub(1, std::memory_order_relaxed);
        } else {
            n_prefetching_--;
            if (!ended && !stop_) {
                if (is_set(request.urgent)) {
                    demand_.push_front({ request, nullptr });
                    n_demand_.fetch_add(1, std::memory_order_relaxed);
                } else {
                    prefetch_.push_front(request);
                }
            }
        }
    }
}

}  // namespace hobbit
