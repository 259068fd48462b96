// Whether reading ahead pays on this machine, with this model, now: it is tried.
//
// A trial decodes some tokens with and some without, in alternating blocks, and compares the medians of their times, each as it would be
// had the token missed as many bytes as the others: without that the same trial gave .80 to 1.12, by where in the text its blocks lay. On
// a disk that is busy all the time a prefetch only takes bandwidth from demand reads, and its prediction time from the compute threads; then it stays
// off until the next trial. Ties go to off: what does not gain is not worth the reads.
//
// Blocks, since a token changes the next: by what it leaves in the cache, and in the allowance of a throttled disk. Token by token
// alternating, a disk of 500 MB/s seemed to gain where blocks show that it loses a fifth.
#pragma once

#include <cstdint>
#include <vector>

namespace hobbit {

class prefetch_trial {
  public:
    static constexpr uint32_t BLOCK  = 8;    // tokens one way before it changes; the first of them does not count
    static constexpr uint32_t N_EACH = 24;   // tokens of a trial with, and as many without
    static constexpr uint32_t PERIOD = 512;  // tokens from one trial to the next
    static constexpr uint32_t FIRST  = 16;   // tokens before the first, with: a cold cache says nothing

    // Whether the next token is decoded with prefetch.
    bool on() const { return trying() ? n_ / BLOCK % 2 == 0 : on_; }

    // A token was decoded, as on() said, and `bytes` were read that it needed. Without any there is nothing to compare.
    void measured(double seconds, uint64_t bytes);

    bool trying() const { return n_ < 2 * N_EACH; }

    // Time with over time without, at the same bytes, by the last trial; 0: none yet.
    double ratio() const { return ratio_; }

  private:
    struct token {
        double seconds;
        double bytes;
    };

    static double seconds_a_byte(const std::vector<token> (&tokens)[2]);

    bool               on_    = true;            // a cold cache has much to read; with little of it in vain
    uint32_t           n_     = 2 * N_EACH;      // of the trial
    uint32_t           since_ = PERIOD - FIRST;  // tokens since it
    double             ratio_ = 0.0;
    std::vector<token> tokens_[2];  // without, with
};

}  // namespace hobbit
