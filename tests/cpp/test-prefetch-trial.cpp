// engine/prefetch-trial.h: reading ahead goes on where it is faster, and off where it is not.
#include "engine/prefetch-trial.h"

#include "test.h"

using hobbit::prefetch_trial;

namespace {

// `n` tokens, of which those with prefetch take `with` seconds and the others `without`.
void decode(prefetch_trial & trial, uint32_t n, double with, double without) {
    for (uint32_t i = 0; i < n; ++i) {
        trial.measured(trial.on() ? with : without, 1 + i % 3);
    }
}

constexpr uint32_t TRIAL = prefetch_trial::FIRST + 2 * prefetch_trial::N_EACH;

}  // namespace

TEST("it is on until it was tried") {
    prefetch_trial trial;
    CHECK(trial.on() && trial.ratio() == 0.0);
    decode(trial, prefetch_trial::FIRST - 1, 2.0, 1.0);
    CHECK(trial.on() && !trial.trying());
}

TEST("where it is faster it stays on, where it is not it stays off") {
    prefetch_trial gains, loses;
    decode(gains, TRIAL, 0.9, 1.0);
    CHECK(gains.on() && gains.ratio() == 0.9);
    decode(loses, TRIAL, 1.1, 1.0);
    CHECK(!loses.on() && loses.ratio() > 1.0);
}

TEST("it is tried again after a while, and the disk may have changed") {
    prefetch_trial trial;
    decode(trial, TRIAL, 1.1, 1.0);
    decode(trial, prefetch_trial::PERIOD - 1, 1.0, 1.0);
    CHECK(!trial.on());
    decode(trial, 1 + 2 * prefetch_trial::N_EACH, 0.5, 1.0);
    CHECK(trial.on() && trial.ratio() == 0.5);
}

TEST("a token that is slow for another reason does not decide") {
    prefetch_trial trial;
    decode(trial, prefetch_trial::FIRST + 1, 0.9, 1.0);
    trial.measured(trial.on() ? 50.0 : 0.001, 1);
    decode(trial, 2 * prefetch_trial::N_EACH - 2, 0.9, 1.0);
    CHECK(trial.on());
}

TEST("what a token leaves to the next does not decide") {
    prefetch_trial trial;
    bool           was = false;
    for (uint32_t i = 0; i < TRIAL; ++i) {
        const bool on = trial.on();
        trial.measured(on ? (was ? 1.0 : 0.5) : (was ? 2.0 : 0.9), 1);
        was = on;
    }
    CHECK(!trial.on() && !trial.trying() && trial.ratio() > 1.0);
}

TEST("a text that misses more while it is on does not decide") {
    for (const bool gains : { true, false }) {
        prefetch_trial trial;
        for (uint32_t i = 0; i < TRIAL; ++i) {
            const bool     on    = trial.on();
            const uint64_t bytes = (on == gains ? 60 : 40) + i * 7 % 11;
            trial.measured(1.0 + 0.01 * (double) bytes + (on ? gains ? -0.1 : 0.1 : 0.0), bytes);
        }
        CHECK_EQ(trial.on(), gains);
        CHECK(trial.ratio() > 0.9 && trial.ratio() < 1.1);
    }
}

TEST("tokens for which nothing was read are no measure") {
    prefetch_trial trial;
    decode(trial, prefetch_trial::FIRST, 0.9, 1.0);
    for (int i = 0; i < 100; ++i) {
        trial.measured(1.0, 0);
    }
    CHECK(trial.trying());
}

TEST_MAIN()
