#include "timeline.h"

#include <algorithm>

namespace hobbit {

static double seconds(timeline::clock::time_point from, timeline::clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
}

void timeline::enable(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (token * t : { &now_, &last_, &slowest_ }) {
        *t = {};
        if (on) {
            t->events.reserve(MAX_EVENTS + 1);  // now: the threads that add to it cannot say that there is no memory
        }
    }
    running_ = bracketed_ = false;
    on_.store(on, std::memory_order_relaxed);
}

void timeline::open(clock::time_point now) {
    start_    = now;
    running_  = true;
    n_tokens_ = 0;
    now_.events.clear();
}

void timeline::close(clock::time_point now) {
    if (!running_) {
        return;
    }
    running_ = false;
    if (n_tokens_ != 1) {
        return;
    }
    now_.seconds = seconds(start_, now);
    now_.events.push_back({ HOBBIT_EVENT_DECODE, 0, 0.0, now_.seconds, 0 });
    if (now_.seconds > slowest_.seconds) {
        slowest_ = now_;
    }
    std::swap(last_, now_);
}

void timeline::begin() {
    if (!on()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    bracketed_ = true;
    open(clock::now());
}

void timeline::end() {
    if (!on()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    close(clock::now());
}

void timeline::batch(uint32_t n_tokens) {
    if (!on()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (!bracketed_) {
        const auto now = clock::now();
        close(now);
        open(now);
    }
    // A llama_decode may be several batches: a token is what comes alone.
    n_tokens_ += n_tokens;
}

void timeline::add(hobbit_event_kind kind, uint32_t block, clock::time_point begin, clock::time_point end, uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!running_ || now_.events.size() >= MAX_EVENTS || end < start_) {
        return;
    }
    now_.events.push_back({ kind, block, seconds(start_, std::max(begin, start_)), seconds(start_, end), bytes });
}

std::vector<hobbit_event> timeline::events(bool slowest) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return slowest ? slowest_.events : last_.events;
}

}  // namespace hobbit
