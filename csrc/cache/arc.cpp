#include "eviction.h"

#include <algorithm>

namespace hobbit {

namespace {

enum class list : uint8_t { none, t1, t2, b1, b2 };

class arc final : public eviction_ledger {
  public:
    arc(const std::vector<uint32_t> & slots, uint32_t n_expert) : layers_(slots.size()) {
        for (size_t l = 0; l < slots.size(); ++l) {
            layers_[l].capacity = slots[l];
            layers_[l].experts.resize(n_expert);
            layers_[l].sizes[(int) list::none] = n_expert;
        }
    }

    void used(uint32_t layer, uint32_t expert, bool resident) override {
        state & s = layers_[layer];
        entry & e = s.experts[expert];
        if (resident) {  // case I
            move(s, e, e.waiting ? list::t1 : list::t2);
            e.waiting = false;
            return;
        }
        s.incoming          = e.where;
        const float b1      = (float) s.size(list::b1);
        const float b2      = (float) s.size(list::b2);
        const auto  ceiling = (float) s.capacity;
        switch (e.where) {
            case list::b1:  // case II: T1 was too small
                s.target = std::min(ceiling, s.target + std::max(1.0f, b2 / b1));
                break;
            case list::b2:  // case III: T2 was
                s.target = std::max(0.0f, s.target - std::max(1.0f, b1 / b2));
                break;
            default:  // case IV: as many ghosts as there are slots
                if (s.size(list::t1) + s.size(list::b1) >= s.capacity) {
                    forget(s, list::b1);
                } else if (s.size(list::t1) + s.size(list::t2) + s.size(list::b1) + s.size(list::b2) >= 2 * s.capacity) {
                    forget(s, list::b2);
                }
                break;
        }
    }

    void inserted(uint32_t layer, uint32_t expert, bool prefetched) override {
        state &    s     = layers_[layer];
        entry &    e     = s.experts[expert];
        const bool ghost = e.where == list::b1 || e.where == list::b2;
        e.waiting        = prefetched;
        move(s, e, ghost && !prefetched ? list::t2 : list::t1);
    }

    void evicted(uint32_t layer, uint32_t expert) override {
        state & s = layers_[layer];
        entry & e = s.experts[expert];
        // With T1 in all slots there is no room for ghosts of it, unless one of T2 makes it. What was never used leaves none.
        const bool fresh    = s.incoming != list::b1 && s.incoming != list::b2;
        const bool no_ghost = e.waiting || (fresh && e.where == list::t1 && s.size(list::t1) >= s.capacity);
        move(s, e, no_ghost ? list::none : e.where == list::t1 ? list::b1 : list::b2);
        e.waiting = false;
    }

    // REPLACE: from T1 while it is above its target, else from T2.
    float priority(uint32_t layer, uint32_t expert) const override {
        const state & s     = layers_[layer];
        const auto    t1    = (float) s.size(list::t1);
        const bool    of_t1 = s.size(list::t1) > 0 &&
                           (t1 > s.target || (s.incoming == list::b2 && t1 == s.target) || s.size(list::t1) >= s.capacity);
        return (s.experts[expert].where == list::t1) == of_t1 ? 0.0f : 1.0f;
    }

  private:
    struct entry {
        list     where   = list::none;
        bool     waiting = false;  // read ahead, not yet used
        uint64_t moved   = 0;
    };

    struct state {
        std::vector<entry> experts;
        uint32_t           capacity = 0;
        float              target   = 0.0f;        // p, of T1
        list               incoming = list::none;  // where that was which is to be inserted
        uint32_t           sizes[5] = {};

        uint32_t size(list l) const { return sizes[(int) l]; }
    };

    void move(state & s, entry & e, list to) {
        s.sizes[(int) e.where]--;
        s.sizes[(int) to]++;
        e.where = to;
        e.moved = ++clock_;
    }

    // Drops the oldest ghost of a list.
    void forget(state & s, list from) {
        entry * oldest = nullptr;
        for (entry & e : s.experts) {
            if (e.where == from && (oldest == nullptr || e.moved < oldest->moved)) {
                oldest = &e;
            }
        }
        if (oldest != nullptr) {
            move(s, *oldest, list::none);
        }
    }

    std::vector<state> layers_;
    uint64_t           clock_ = 0;
};

}  // namespace

std::unique_ptr<eviction_ledger> make_arc(const std::vector<uint32_t> & slots, uint32_t n_expert) {
    return std::make_unique<arc>(slots, n_expert);
}

}  // namespace hobbit
