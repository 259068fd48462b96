// A disk with a virtual clock, in place of the reader threads: the same two queues by the same rules (io/io-pool.h), but a read is an
// event. Single-threaded; the handler is called from advance() only.
//
// A read waits for one of `depth` places, then for `latency`, then for the transfers before it: all share one bandwidth. So a
// queue depth of 1 pays the latency of every read, a deep queue reaches the bandwidth.
#pragma once

#include "../io/reader.h"

#include <deque>
#include <limits>
#include <queue>

namespace hobbit {

struct disk_model {
    double   bandwidth    = std::numeric_limits<double>::infinity();  // bytes per second
    double   latency      = 0.0;                                      // seconds
    uint32_t depth        = 8;                                        // reads at a time
    uint64_t block        = 128 * 1024;  // of a prefetch read, between two looks at the abort flag
    uint32_t max_prefetch = 2;
};

class sim_disk final : public reader {
  public:
    sim_disk(const disk_model & model, handler on_end) :
        model_(model), max_prefetch_(model.max_prefetch), on_end_(std::move(on_end)) {}

    void                    demand(const std::vector<io_request> & requests) override;
    void                    prefetch(const std::vector<io_request> & requests) override;
    void                    promote(const void * owner) override;
    std::vector<io_request> withdraw(const void * owner) override;

    uint32_t demand_pending() const override { return n_demand_; }

    void set_max_prefetch(uint32_t n) override { max_prefetch_ = n; }

    void drain() override;

    void stop() override {}

    double now() const { return now_; }

    // When the next read, or block of a prefetch, ends; infinity when nothing is being read.
    double next_event();
    // Moves the clock to `time` and ends what ends until then.
    void advance(double time);

  private:
    struct running {
        double     end;
        uint64_t   order;  // of ties
        bool       is_demand;
        bool       cancelled;
        uint64_t   bytes;  // of this block
        io_request request;

        bool operator<(const running & o) const { return end != o.end ? end > o.end : order > o.order; }
    };

    // As io_pool::prefetch_may_run().
    bool prefetch_may_run() const { return demand_.empty() && n_demand_ <= DEMAND_TAIL && !draining_; }

    void start();
    void run(const io_request & request, bool is_demand);
    void end_of(running r);

    const disk_model model_;
    uint32_t         max_prefetch_;
    const handler    on_end_;

    double                       now_           = 0.0;
    double                       pipe_free_     = 0.0;  // end of the last transfer
    uint64_t                     order_         = 0;
    uint32_t                     n_demand_      = 0;  // queued or running
    uint32_t                     n_prefetching_ = 0;
    bool                         draining_      = false;
    std::deque<io_request>       demand_;
    std::deque<io_request>       prefetch_;
    std::priority_queue<running> running_;
};

}  // namespace hobbit
