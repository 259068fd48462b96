#include "sim-disk.h"

#include <algorithm>

namespace hobbit {

void sim_disk::demand(const std::vector<io_request> & requests) {
    demand_.insert(demand_.end(), requests.begin(), requests.end());
    n_demand_ += (uint32_t) requests.size();
}

void sim_disk::prefetch(const std::vector<io_request> & requests) {
    prefetch_.insert(prefetch_.end(), requests.begin(), requests.end());
}

void sim_disk::promote(const void * owner) { demand(take_requests_of(owner, prefetch_)); }

std::vector<io_request> sim_disk::withdraw(const void * owner) { return take_requests_of(owner, prefetch_); }

void sim_disk::drain() {
    draining_ = true;
    while (next_event() < std::numeric_limits<double>::infinity()) {
        advance(running_.top().end);
    }
    draining_ = false;
}

// As io_pool::run() takes requests: demand first, prefetch when none is queued and the last few are running.
void sim_disk::start() {
    while (running_.size() < model_.depth) {
        if (!demand_.empty()) {
            run(demand_.front(), true);
            demand_.pop_front();
        } else if (!prefetch_.empty() && n_prefetching_ < max_prefetch_ && prefetch_may_run()) {
            n_prefetching_++;
            run(prefetch_.front(), false);
            prefetch_.pop_front();
        } else {
            return;
        }
    }
}

void sim_disk::run(const io_request & request, bool is_demand) {
    running r;
    r.order     = order_++;
    r.is_demand = is_demand;
    r.cancelled = !is_demand && is_set(request.cancel) && !is_set(request.urgent);
    r.bytes     = request.bytes - request.done;
    r.bytes     = is_demand ? r.bytes : std::min(r.bytes, model_.block);
    r.request   = request;
    if (r.cancelled) {
        r.end = now_;
    } else {
        r.end      = std::max(now_ + model_.latency, pipe_free_) + (double) r.bytes / model_.bandwidth;
        pipe_free_ = r.end;
    }
    running_.push(std::move(r));
}

double sim_disk::next_event() {
    start();
    return running_.empty() ? std::numeric_limits<double>::infinity() : running_.top().end;
}

void sim_disk::advance(double time) {
    while (next_event() <= time) {
        running r = running_.top();
        running_.pop();
        now_ = std::max(now_, r.end);
        end_of(std::move(r));
    }
    now_ = std::max(now_, time);
}

// As io_pool::read_prefetch(), seen from the end of a block.
void sim_disk::end_of(running r) {
    io_request & q = r.request;
    if (r.is_demand) {
        on_end_(q, io_outcome::done, nullptr);
        n_demand_--;
        return;
    }
    n_prefetching_--;
    if (r.cancelled) {
        on_end_(q, io_outcome::cancelled, nullptr);
        return;
    }
    q.done += r.bytes;
    if (q.done >= q.bytes) {
        on_end_(q, io_outcome::done, nullptr);
    } else if (is_set(q.cancel) && !is_set(q.urgent)) {
        on_end_(q, io_outcome::cancelled, nullptr);
    } else if (is_set(q.urgent)) {
        demand_.push_front(q);
        n_demand_++;
    } else if (!prefetch_may_run()) {
        prefetch_.push_front(q);
    } else {
        n_prefetching_++;
        run(q, false);
    }
}

}  // namespace hobbit
