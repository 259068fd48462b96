#include "bound.h"

#include <algorithm>
#include <array>
#include <queue>

namespace hobbit {

namespace {

// Bytes of an expert that are always needed together: [0, low) and [low, high).
struct piece {
    uint64_t size = 0;
    uint64_t held = 0;
    uint64_t next = UINT64_MAX;  // request that needs it next
};

class page_cache {
  public:
    page_cache(uint32_t n_experts, uint64_t bytes_high, uint64_t bytes_low, uint64_t capacity) :
        capacity_(capacity), pieces_((size_t) n_experts * 2) {
        for (size_t i = 0; i < pieces_.size(); i += 2) {
            pieces_[i].size     = bytes_low;
            pieces_[i + 1].size = bytes_high - bytes_low;
        }
    }

    // Bytes of the piece that have to be read.
    uint64_t missing(size_t which) const { return pieces_[which].size - pieces_[which].held; }

    // Needed now, and not evicted before release().
    void pin(size_t which) { pieces_[which].next = PINNED; }

    // Holds all of it now.
    void fill(size_t which) {
        held_ += missing(which);
        pieces_[which].held = pieces_[which].size;
    }

    // Needed again at `next`.
    void release(size_t which, uint64_t next) {
        pieces_[which].next = next;
        farthest_.push({ next, which });
    }

    // Evicts until `bytes` more would fit.
    void make_room(uint64_t bytes) {
        while (held_ + bytes > capacity_ && !farthest_.empty()) {
            const auto [next, which] = farthest_.top();
            piece & p                = pieces_[which];
            if (p.next != next || p.held == 0) {
                farthest_.pop();  // out of date
                continue;
            }
            const uint64_t n = std::min(p.held, held_ + bytes - capacity_);
            p.held -= n;
            held_ -= n;
        }
    }

  private:
    static constexpr uint64_t PINNED = UINT64_MAX - 1;  // no request has this number

    const uint64_t                                   capacity_;
    uint64_t                                         held_ = 0;
    std::vector<piece>                               pieces_;
    std::priority_queue<std::pair<uint64_t, size_t>> farthest_;
};

}  // namespace

bound_result belady(const std::vector<bound_request> & requests, uint32_t n_experts, uint64_t bytes_high, uint64_t bytes_low,
                    uint64_t capacity, bool may_pass) {
    using policy::need;
    // When each piece is needed again; 0 = [0, low), 1 = [low, high).
    constexpr uint64_t                   NEVER = UINT64_MAX;
    std::vector<std::array<uint64_t, 2>> next(requests.size());
    std::vector<uint64_t>                seen((size_t) n_experts * 2, NEVER);
    for (size_t i = requests.size(); i > 0; --i) {
        const bound_request & r = requests[i - 1];
        const size_t          e = (size_t) r.expert * 2;
        next[i - 1]             = { seen[e], seen[e + 1] };
        if (r.need >= need::low) {
            seen[e] = i - 1;
        }
        if (r.need == need::high) {
            seen[e + 1] = i - 1;
        }
    }
    bound_result out;
    out.selections = requests.size();
    page_cache cache(n_experts, bytes_high, bytes_low, capacity);
    for (size_t i = 0; i < requests.size(); ++i) {
        const bound_request & r = requests[i];
        if (r.need < need::low) {
            out.skips++;
            continue;
        }
        const size_t e       = (size_t) r.expert * 2;
        const size_t n       = r.need == need::high ? 2 : 1;
        uint64_t     missing = 0;
        for (size_t p = e; p < e + n; ++p) {
            cache.pin(p);
            missing += cache.missing(p);
        }
        if (!may_pass) {
            cache.make_room(missing);
        }
        for (size_t p = e; p < e + n; ++p) {
            cache.fill(p);
            cache.release(p, next[i][p - e]);
        }
        cache.make_room(0);  // with may_pass what was just read can be the farthest
        out.hits += missing == 0;
        out.bytes += missing;
    }
    return out;
}

}  // namespace hobbit
