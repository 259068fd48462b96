// What happened when in one token: for a picture of it. Off, it costs one relaxed load where something could be noted.
#pragma once

#include "../hobbit.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <vector>

namespace hobbit {

class timeline {
  public:
    using clock = std::chrono::steady_clock;

    // Of one layer of a big model some 30 events are noted; what is more than this is left out.
    static constexpr size_t MAX_EVENTS = 16384;

    bool on() const { return on_.load(std::memory_order_relaxed); }

    // Switching it on forgets what was recorded.
    void enable(bool on);

    // Bracket one llama_decode. Without it the first layer's router opens the token, and the next one's closes it.
    void begin();
    void end();

    // The first layer's router has spoken for a batch of this many tokens; only single tokens are kept.
    void batch(uint32_t n_tokens);

    // Any thread. Times before the token began are cut.
    void add(hobbit_event_kind kind, uint32_t block, clock::time_point begin, clock::time_point end, uint64_t bytes = 0);

    // The last whole token, or the slowest. Empty when there was none.
    std::vector<hobbit_event> events(bool slowest) const;

  private:
    struct token {
        std::vector<hobbit_event> events;
        double                    seconds = 0.0;
    };

    void open(clock::time_point now);
    void close(clock::time_point now);

    std::atomic<bool>  on_ { false };
    mutable std::mutex mutex_;  // guards all below; nothing is locked under it
    bool               bracketed_ = false;
    bool               running_   = false;
    uint32_t           n_tokens_  = 0;
    clock::time_point  start_;
    token              now_;
    token              last_;
    token              slowest_;
};

}  // namespace hobbit
