"""The quality curve, and the dial that holds what was asked for: by hand, and with an engine that is made up."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import List, Sequence

import numpy as np
import pytest

from curves import SENSITIVITY, made_up_curve, made_up_weights
from hobbit_cpp import Llama, OffloadParams, ParameterError
from hobbit_cpp.calibrate import curve as cv
from hobbit_cpp.calibrate.dial import BytesFeedback, LossFeedback
from hobbit_cpp.calibrate.quality import parse_quality
from hobbit_cpp.evaluate.settings import parse_setting
from hobbit_cpp.stats import Served

# ---- the curve -------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    scores = cv.scores_beyond_first(np.array([[[1.0, 3.0, 4.0]], [[2.0, 2.0, 0.0]]]))
    np.testing.assert_allclose(scores, [0.5, 0.875, 0.5])  # a weight of 0 is no selection


def test_quantiles_by_hand() -> None:
    # shares .5, .375, .125 in a layer of sensitivity 1, .5, .5 and nothing in one of .4: a weight of 0 is no selection
    weights = np.array([[[1.0, 3.0, 4.0], [1.0, 0.0, 1.0]]] * 50)
    rows, by_weight = cv.quantiles_by_cost(weights, SENSITIVITY)
    assert (by_weight[0], by_weight[200], by_weight[-1]) == (0.5, 0.625, 0.875)
    assert len(rows) == 3 and (rows[0][0], rows[0][-1]) == (0.5, 0.875)
    assert 0.875 < cv.skipping_threshold(by_weight, 0.15, 3) < 0.8751, "a tie is not skipped"
    assert {0.5, 0.625, 0.8, 0.875} <= set(rows[0])
    rows, _ = cv.quantiles_by_cost(np.random.default_rng(0).dirichlet([1, 1, 1], (500, 2)), (1.0, 1.0))
    assert rows[2][-1] < rows[1][-1] < rows[0][-1], "the lightest are skipped"


def test_sensitivity_goes_by_the_root_and_no_layer_is_for_nothing() -> None:
    assert cv.sensitivity_of([0.04, 0.01, 0.09]) == pytest.approx((2 / 3, 1 / 3, 1), abs=1e-4)
    assert cv.sensitivity_of([0.9, -0.1, 0.1]) == pytest.approx((1, (0.03 / 0.9) ** 0.5, (0.1 / 0.9) ** 0.5), abs=1e-4)
    assert cv.sensitivity_of([0, 0]) == (1, 1)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize(("low", "skipped"), [(0, 0), (1, 0), (0.5, 0), (0, 0.15), (0.1, 0.15), (1, 0.1), (0.3, 0.05)])
def test_thresholds_serve_the_shares_that_they_should(k: int, low: float, skipped: float) -> None:
    curve = made_up_curve(k)
    t1, t2 = curve.thresholds(low, skipped)
    weights = made_up_weights(k)
    g = weights / weights.sum(-1, keepdims=True)
    left_out = (1 - g > t2) & (g < g.max(-1, keepdims=True))
    high = ~left_out & (1 - np.array(SENSITIVITY)[:, None] * g <= t1) & (t1 > 0)
    want = curve.shares(low, skipped)
    np.testing.assert_allclose([high.mean(), 1 - high.mean() - left_out.mean(), left_out.mean()], want, atol=2e-3)
    assert sum(want) == pytest.approx(1)
    assert (t1 == 0) == (low == 1), "all low is reached exactly"


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_papers_quantiles(k: int) -> None:
    weights = made_up_weights(k)
    t1, t2 = cv.paper_quantiles(weights)
    beyond = cv.scores_beyond_first(weights)
    first = len(beyond) / (k - 1)
    assert (first + (beyond <= t1).sum()) / (k * first) == pytest.approx(max(0.67, 1 / k), abs=2e-3)
    assert (beyond > t2).sum() / (k * first) == pytest.approx(0.03, abs=2e-3)


def test_loss_is_that_of_the_points_and_never_falls() -> None:
    rng = np.random.default_rng(3)
    noisy = {(a, s): max(0.0, 0.02 * a + 0.4 * s + rng.normal(0, 0.01)) for a in cv.LOW_SHARES for s in cv.SKIPPED_SHARES}
    curve = made_up_curve(kl=lambda a, s: noisy[a, s])
    low, skipped = np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 0.15, 31), indexing="ij")
    loss = curve.loss(low, skipped)
    assert (np.diff(loss, axis=0) >= -1e-12).all() and (np.diff(loss, axis=1) >= -1e-12).all()
    smooth = made_up_curve(ratio=1.25)
    for p in smooth.points:
        assert smooth.loss(p.low, p.skipped) == pytest.approx(p.loss, rel=1e-3)
    assert smooth.loss(0, 0) == 0
    assert smooth.loss(0.6, 0.02) == pytest.approx(smooth.loss(0.6, 0) + 1.25 * 0.008, rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.005])
def test_the_divergence_that_any_change_makes_is_hardly_a_loss(noise: float) -> None:
    curve = made_up_curve(noise=noise)
    assert curve.noise == pytest.approx(noise, abs=1e-4)
    for p in curve.points:
        assert curve.loss(p.low, p.skipped) == pytest.approx(max(p.loss, cv.RATIO_FLOOR * p.kl), rel=1e-3, abs=1e-5)
    assert 0 < curve.loss(0.01, 0) < curve.loss(0.1, 0), "a little low is not for nothing"


def by_low(kl: Sequence[float], loss: Sequence[float], se: float = 0.002) -> cv.Curve:
    """A curve of a model with one expert a token, whose selections all cost alike."""
    points = tuple(cv.Point(a, 0.0, 0, 1, (0, 0, 0), x, se, d, 1) for a, d, x in zip(cv.LOW_SHARES[1:], kl, loss))
    return cv.Curve(1, 0.5, (1.0,), ((0.5, 0.5),), (0.5, 1.0), points)


@pytest.mark.parametrize(
    ("kl", "noise"),
    [
        ((0.012, 0.020, 0.028, 0.033, 0.035), 0.008),  # as if it were to end: 0.012 - (0.020 - 0.012) / 2
        ((0.001, 0.003, 0.006, 0.0085, 0.01), 0.0),  # in proportion from the beginning
        ((0.006, 0.006, 0.006, 0.006, 0.006), 0.006),
        ((0.006, 0.005, 0.004, 0.003, 0.003), 0.006),  # falls, by chance
        ((0.0, 0.0, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_what_rises_otherwise_is_not_taken_for_noise(kl: Sequence[float], noise: float) -> None:
    assert by_low(kl, kl).noise == pytest.approx(noise, abs=1e-9)


def test_a_loss_that_was_measured_is_not_argued_away() -> None:
    flat = by_low((0.006,) * 5, (0.05,) * 5)
    assert flat.loss(1, 0) == pytest.approx(0.05 - 1.64 * 0.002) and flat.at_change(0.005)[0] < 0.02
    no_costs = replace(flat, quantiles=((1.0, 1.0),))
    assert no_costs.noise == 0


def test_what_skipping_loses_has_a_ratio_of_its_own() -> None:
    curve = made_up_curve(ratio=0.8, skipping=2.0, noise=0.005)
    (low, _), (skipping, _) = curve.ratios
    assert (low, skipping) == pytest.approx((0.8, 2.0), rel=0.01)
    alone = made_up_curve(1, ratio=0.8, noise=0.005)
    assert alone.ratios[0][0] == pytest.approx(0.8, rel=0.01) and alone.ratios[1] == (1, 0)


def test_a_ratio_is_that_of_all_points_and_counts_with_its_error() -> None:
    def point(low: float, loss: float, se: float, kl: float) -> cv.Point:
        return cv.Point(low, 0.0, 0, 1, (0, 0, 0), loss, se, kl, 1)

    points = (point(0.5, 0.012, 0.01, 0.01), point(1.0, 0.03, 0.02, 0.04))
    # of even costs: the sum of squares at a half is half of all, the noise none
    curve = cv.Curve(1, 0.5, (1.0,), ((0.5, 0.5),), (0.5, 1.0), points)
    assert curve.noise == 0
    # by hand: weights (kl / se)^2 = 1 and 4, slopes 1.2 and 0.75
    assert curve.ratios[0] == pytest.approx(((1.2 + 4 * 0.75) / 5, 0.5))
    assert curve.loss(1, 0) == pytest.approx(0.04 * (0.84 + 1.64 * 0.5))
    lucky = replace(made_up_curve(), points=tuple(replace(p, loss=-p.loss) for p in made_up_curve().points))
    assert lucky.ratios[0][0] == pytest.approx(-1)
    assert lucky.loss(1, 0) == pytest.approx(cv.RATIO_FLOOR * 0.02, rel=0.01), "a text that gains by chance promises nothing"


def test_without_any_divergence_nothing_is_lost() -> None:
    curve = made_up_curve(kl=lambda low, skipped: 0.0)
    assert curve.noise == 0 and curve.ratios == ((1, 0), (1, 0)) and curve.loss(1, 0.15) == 0


def test_a_change_of_perplexity_is_kept_at_the_fewest_bytes() -> None:
    curve = made_up_curve()
    assert curve.at_change(0) == (0, 0) and curve.thresholds(0, 0) == (1, 1)
    assert curve.at_change(10) == (1, 0.15)
    bytes_before = 2.0
    for change in (0.002, 0.005, 0.01, 0.02, 0.05):
        low, skipped = curve.at_change(change)
        asked = curve.asked(low, skipped)
        assert curve.loss(low, skipped) <= math.log1p(change) and asked < bytes_before
        bytes_before = asked
        for a, s in itertools.product(np.linspace(0, 1, 101), np.linspace(0, 0.15, 61)):
            assert curve.asked(a, s) >= asked - 1e-9 or curve.loss(a, s) > math.log1p(change)


def test_so_many_bytes_are_kept_at_the_least_loss() -> None:
    curve = made_up_curve()
    assert curve.at_asked(1.0) == (0, 0)
    assert curve.at_asked(0.01) == curve.frontier[-1][2:] == (1, 0.15), "as few as there are"
    for share in (0.9, 0.7, 0.6):
        low, skipped = curve.at_asked(share)
        assert curve.asked(low, skipped) <= share
        for a, s in itertools.product(np.linspace(0, 1, 101), np.linspace(0, 0.15, 61)):
            assert curve.asked(a, s) > share or curve.loss(a, s) >= curve.loss(low, skipped) - 1e-12


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_qualities() -> None:
    assert parse_quality("Exact ").exact and parse_quality("paper").paper
    assert parse_quality("1%").change == 0.01 and parse_quality(" .5 %").change == 0.005 and parse_quality("0%").change == 0
    for text in ("40MB/token", "40 mb/tok", "40.0 MB / token"):
        assert parse_quality(text).bytes_per_token == 40e6
    for text in ("", "1", "best", "-1%", "1%%", "0MB/token", "40MB", "1e3%", "nan%", "2000%"):
        with pytest.raises(ParameterError, match="is not 'exact'"):
            parse_quality(text)


def test_what_goes_together() -> None:
    assert OffloadParams(quality="exact").exact and OffloadParams(mode="lru", quality="exact").exact
    for more in ({"exact": True}, {"t1": 0.1, "t2": 0.2}, {"mode": "fate"}, {"precision_rule": "drop", "drop_fraction": 1.0}):
        with pytest.raises(ParameterError, match="leave one out"):
            OffloadParams(quality="1%", **more)
    with pytest.raises(ParameterError, match="weight"):
        OffloadParams(quality="40MB/token", precision_rule="weight")
    base = OffloadParams(quality="2%")
    assert parse_setting("exact", base).params.exact and parse_setting("weight", base).params.quality == "2%"
    assert parse_setting("low", base).params.quality == "2%" and parse_setting("low=0.1:0.2", base).params.quality is None
    with pytest.raises(ParameterError, match="needs an offload"):
        Llama("nothing.gguf", quality="1%")


class FakeEngine:
    """Reads what is asked for times a share of misses; told its thresholds."""

    def __init__(self, curve: cv.Curve, misses: float) -> None:
        self.curve, self.misses = curve, misses
        self.tokens = self.read = 0
        self.asked = 1.0
        self.losses: List[float] = []

    def apply(self, t1: float, t2: float) -> None:
        place = next(p for p in self.curve.frontier if self.curve.thresholds(*p[2:]) == (t1, t2))
        self.asked = place[1]
        self.losses.append(place[0])

    def decode(self, n: int = 1) -> None:
        self.tokens += n
        self.read += round(n * self.asked * self.misses * 1e8)

    def counts(self) -> Served:
        return Served(tokens=self.tokens, n_bytes=self.read)


def test_feedback_holds_the_bytes_while_the_cache_changes() -> None:
    engine = FakeEngine(made_up_curve(), misses=0.6)
    feedback = BytesFeedback(engine.curve, 100_000_000, 40e6, engine.apply)
    assert engine.losses[0] > 0, "a cold cache: little is asked for"
    for misses in (0.6, 0.45, 0.55):
        engine.misses = misses
        for _ in range(400):
            engine.decode()
            feedback.after_decode(engine.counts)
        assert engine.asked * misses == pytest.approx(0.4, abs=0.01)
    engine.misses = 0.1  # there is room for everything
    for _ in range(400):
        engine.decode()
        feedback.after_decode(engine.counts)
    assert engine.losses[-1] == 0 and engine.asked == 1


class FakeCache:
    """Serves high what is cached, which has a part of the cost; told its thresholds."""

    def __init__(self, curve: cv.Curve, misses: float) -> None:
        self.curve, self.misses = curve, misses
        self.served = Served()
        self.at = (0.0, 0.0)
        self.cost = 0.01

    def apply(self, t1: float, t2: float) -> None:
        self.at = next(p[2:] for p in self.curve.frontier if self.curve.thresholds(*p[2:]) == (t1, t2))

    def decode(self) -> None:
        s, n = self.served, 10_000
        _, low, skipped = self.curve.shares(*self.at)
        served = int(n * self.misses * low), int(n * self.misses * skipped)
        costs = n * low * self.cost, n * self.misses * low * self.cost
        self.served = Served(
            s.tokens + 1, s.n_bytes + 1, s.selections + n, s.low + served[0], s.skipped + served[1],
            s.cost_asked + costs[0], s.cost_low + costs[1],
        )  # fmt: skip

    def counts(self) -> Served:
        return self.served

    def loss(self) -> float:
        """Of what is asked for, the share that is not cached; selections of a layer cost alike here."""
        return self.misses * float(self.curve.loss(*self.at))


@pytest.mark.parametrize("misses", [1.0, 0.5, 0.2])
def test_what_the_cache_serves_high_leaves_room_for_more_in_low_precision(misses: float) -> None:
    engine = FakeCache(made_up_curve(), misses)
    feedback = LossFeedback(engine.curve, 0.01, engine.apply)
    by_weight_alone = float(engine.curve.loss(*engine.at))
    assert by_weight_alone <= math.log(1.01) + 1e-9
    for _ in range(400):
        engine.decode()
        feedback.after_decode(engine.counts)
    most = float(engine.curve.frontier[-1][0])
    assert engine.loss() <= math.log(1.01) * 1.05
    _, low, skipped = engine.curve.shares(*engine.at)
    served = misses * low / (1 - misses * skipped), misses * skipped
    assert engine.curve.loss(*served) <= math.log(1.01) * 1.05, "nor is more served than a point of that loss has"
    assert engine.loss() >= math.log(1.01) * 0.9 or engine.curve.loss(*engine.at) == pytest.approx(most)
    assert float(engine.curve.loss(*engine.at)) >= by_weight_alone


def test_what_the_cache_spares_counts_by_its_cost() -> None:
    """Half of what is asked for low is cached, but that of little weight: the loss is hardly less than without a cache."""
    engine = FakeCache(made_up_curve(kl=lambda low, skipped: 0.1 * low**2 + 2 * skipped), misses=0.5)
    feedback = LossFeedback(engine.curve, 0.01, engine.apply)
    before = engine.at
    for _ in range(400):
        engine.decode()
        s = engine.served
        engine.served = replace(s, cost_low=0.9 * s.cost_asked)
        feedback.after_decode(engine.counts)
    low = engine.at[0]
    assert before[0] <= low and engine.curve.loss(low, 0) == pytest.approx(math.log(1.01) / 0.9, rel=0.05)


def test_what_is_skipped_for_other_reasons_does_not_end_it() -> None:
    """As by max_experts: more than any point skips."""
    engine = FakeCache(made_up_curve(), misses=0.5)
    feedback = LossFeedback(engine.curve, 0.01, engine.apply)

    def decode(n: int, more: int) -> None:
        for _ in range(n):
            engine.decode()
            engine.served = replace(engine.served, skipped=engine.served.skipped + more)
            feedback.after_decode(engine.counts)

    alone = engine.at
    decode(200, 5000)
    assert engine.at == alone, "no more than by scores alone"
    decode(400, 0)
    assert engine.loss() == pytest.approx(math.log(1.01), rel=0.1)


def test_feedback_lets_batches_and_resets_be() -> None:
    engine = FakeEngine(made_up_curve(), misses=0.6)
    feedback = BytesFeedback(engine.curve, 100_000_000, 40e6, engine.apply)
    for _ in range(40):
        engine.decode(64)
        feedback.after_decode(engine.counts)
    assert len(engine.losses) == 1
    for _ in range(8):
        engine.decode()
        feedback.after_decode(engine.counts)
    assert len(engine.losses) == 2
    engine.tokens = engine.read = 0
    for _ in range(8):
        engine.decode()
        feedback.after_decode(engine.counts)
    assert len(engine.losses) == 2


def test_low_is_a_share_of_what_was_not_skipped() -> None:
    curve = made_up_curve()
    feedback = LossFeedback(curve, 0.01, lambda t1, t2: None)
    feedback._at = (0.5, 0.1)
    cost, asked = feedback._cost(Served(tokens=8, n_bytes=1, selections=1000, low=450, skipped=100, cost_asked=1.0, cost_low=0.0))
    assert cost == pytest.approx(asked)


def test_no_more_is_lost_than_without_a_cache() -> None:
    feedback = LossFeedback(made_up_curve(), 0.01, lambda t1, t2: None)
    feedback._at = (0.3, 0.05)
    cost, asked = feedback._cost(Served(tokens=8, n_bytes=1, selections=1000, low=900, skipped=50, cost_asked=1.0, cost_low=1.0))
    assert cost == asked
