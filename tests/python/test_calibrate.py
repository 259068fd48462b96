"""hobbit calibrate and quality=: the curve against figures worked out by hand, the file, the dial, and tiny real models."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest

from curves import SENSITIVITY, made_up_curve, made_up_weights
from decode import load, logits, words
from hobbit_cpp import CalibrationError, HobbitWarning, Llama, ModelFileError, OffloadParams, ParameterError
from hobbit_cpp.calibrate import curve as cv
from hobbit_cpp.calibrate import weights as wt
from hobbit_cpp.calibrate.dial import DEFAULT, BytesFeedback, LossFeedback, resolve
from hobbit_cpp.calibrate.quality import parse_quality
from hobbit_cpp.calibrate.store import Calibration, calibration_path
from hobbit_cpp.cli import main
from hobbit_cpp.evaluate.settings import parse_setting
from hobbit_cpp.inspection import inspect_file
from hobbit_cpp.stats import Served
from hobbit_cpp.trace import Trace
from models import tiny, tiny_architecture, tiny_dual

quiet = pytest.mark.filterwarnings("ignore:the expert pool holds:hobbit_cpp.HobbitWarning")
Captured = pytest.CaptureFixture[str]


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
    assert smooth.loss(0.6, 0.02) == pytest.approx(1.25 * (0.012 + 0.008), rel=1e-3)


def test_one_ratio_for_all_points() -> None:
    def point(low: float, loss: float, se: float, kl: float) -> cv.Point:
        return cv.Point(low, 0.0, 0, 1, (0, 0, 0), loss, se, kl, 1)

    points = (point(0.5, 0.012, 0.01, 0.01), point(1.0, 0.03, 0.02, 0.04))
    curve = cv.Curve(2, 0.5, (1.0,), ((0.5, 1.0),) * 3, (0.5, 1.0), points)
    # by hand: weights (kl / se)^2 = 1 and 4, slopes 1.2 and 0.75
    assert curve.ratio == pytest.approx(((1.2 + 4 * 0.75) / 5, 0.5))
    lucky = replace(made_up_curve(), points=tuple(replace(p, loss=-p.loss) for p in made_up_curve().points))
    assert lucky.ratio[0] == pytest.approx(-1)
    assert lucky.loss(1, 0) == pytest.approx(cv.RATIO_FLOOR * 0.02), "a text that gains by chance promises nothing"


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
        _, low, skipped = self.curve.shares(*self.at)
        low, skipped = self.misses * low, self.misses * skipped
        return float(self.curve.loss(low / (1 - skipped), skipped))


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


# ---- eviction weights ------------------------------------------------------------------------------------------------


def local_trace(seed: int, tokens: int = 300) -> Trace:
    """Each layer keeps to a few experts for a while."""
    rng = np.random.default_rng(seed)
    layers, experts, k = 4, 16, 2
    favourites = np.stack([rng.permutation(experts)[:5] for _ in range(layers * (tokens // 25 + 1))]).reshape(-1, layers, 5)
    ids = np.empty((tokens, layers, k), np.uint16)
    for t, layer in itertools.product(range(tokens), range(layers)):
        among = favourites[t // 25, layer] if rng.random() < 0.8 else np.arange(experts)
        ids[t, layer] = rng.choice(among, k, replace=False)
    weights = rng.dirichlet(np.ones(k), (tokens, layers)).astype(np.float32)
    return Trace(ids, weights, np.array([tokens], np.int32), experts)


def test_weights_are_the_best_found_and_checked_on_the_held_out_part() -> None:
    train, held_out = (wt.Penalties(local_trace(seed), 2000, 1000, (0.6, 0.9)) for seed in (1, 2))
    steps: List[int] = []
    found, report = wt.find_weights(train, held_out, lambda: steps.append(1))
    rows, best = report["penalty_by_lru"], tuple(report["found"])
    assert sum(best) == pytest.approx(1) and min(best) >= 0 and steps
    assert rows["lru"] == {"train": 1, "held_out": 1}
    corners = [tuple(float(i == j) for j in range(4)) for i in range(4)]
    for weights in [wt.EVEN, *corners]:
        assert rows["found"]["train"] <= train.of("hobbit", weights)  # type: ignore[arg-type]
    assert rows["found"]["held_out"] == held_out.of("hobbit", best)
    assert (found is None) == (rows["found"]["held_out"] >= rows["even"]["held_out"])
    # w_lru alone is LRU, but for ties: the replay is asked the same
    assert train.of("hobbit", (1.0, 0.0, 0.0, 0.0)) == pytest.approx(1, abs=0.02)


def test_weights_that_do_not_hold_are_not_kept() -> None:
    class Known:
        def __init__(self, best: int) -> None:
            self.best, self.trace = best, local_trace(0, 30)

        def of(self, rule: str, weights: Any = None) -> float:
            return 1.0 if weights is None else 1.0 - 0.5 * float(weights[self.best])

    good, report = wt.find_weights(Known(1), Known(1), lambda: None)  # type: ignore[arg-type]
    assert good == (0, 1, 0, 0) and report["penalty_by_lru"]["found"]["held_out"] == 0.5
    bad, report = wt.find_weights(Known(1), Known(2), lambda: None)  # type: ignore[arg-type]
    assert bad is None and report["found"] == [0, 1, 0, 0]


def test_the_ends_of_a_trace() -> None:
    trace = replace(local_trace(0, 30), lens=np.array([10, 12, 8], np.int32))
    head, tail = trace.head(15), trace.tail(15)
    assert head.lens.tolist() == [10, 5] and tail.lens.tolist() == [7, 8]
    assert np.array_equal(np.concatenate([head.ids, tail.ids]), trace.ids)
    assert trace.tail(100).lens.tolist() == [10, 12, 8]


# ---- the file --------------------------------------------------------------------------------------------------------


def made_up() -> Calibration:
    return Calibration("sha256:0", {"Q4_0": 9}, made_up_curve(), (0.5, 0.9), "at the paper's quantiles", (0.1, 0.2, 0.3, 0.4))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.calibration.json"
    for written in (made_up(), replace(made_up(), eviction_weights=None, text={"name": "ä", "tokens": 5})):
        path.write_text(written.to_json(), encoding="utf-8")
        assert Calibration.load(path) == written


def damage(change: Any) -> str:
    data = json.loads(made_up().to_json())
    change(data)
    return json.dumps(data)


DAMAGED: Dict[str, str] = {
    "empty": "",
    "cut": made_up().to_json()[:700],
    "other": '{"a": 1}',
    "list": "[]",
    "format": damage(lambda d: d.update(format=99)),
    "no curve": damage(lambda d: d.pop("curve")),
    "no grid": damage(lambda d: d["curve"]["points"].pop()),
    "no points": damage(lambda d: d["curve"].update(points=[])),
    "not a number": damage(lambda d: d["curve"]["points"][0].update(kl="x")),
    "nan": damage(lambda d: d["curve"]["points"][0].update(kl=math.nan)),
    "negative": damage(lambda d: d["curve"]["points"][0].update(kl=-1.0)),
    "unknown key": damage(lambda d: d["curve"]["points"][0].update(more=1)),
    "k": damage(lambda d: d["curve"].update(k=1)),
    "quantiles": damage(lambda d: d["curve"].update(quantiles=[[0.5, 0.4]] * 3)),
    "quantiles of another grid": damage(lambda d: d["curve"].update(quantiles=[[0.4, 0.5]])),
    "quantiles of weights": damage(lambda d: d["curve"].update(by_weight=[0.5, 0.4])),
    "sensitivity": damage(lambda d: d["curve"].update(sensitivity=[0.5, -0.1])),
    "no sensitivity": damage(lambda d: d["curve"].update(sensitivity=[])),
    "thresholds": damage(lambda d: d.update(thresholds=[0.9, 0.5])),
    "weights": damage(lambda d: d.update(eviction_weights=[1, 1, 1, 1])),
    "types": damage(lambda d: d.update(low_types=[1])),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.calibration.json"
    path.write_text(DAMAGED[what], encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"a\.calibration\.json"):
        Calibration.load(path)


def test_the_name_beside_a_model() -> None:
    assert calibration_path("a/model.gguf") == Path("a/model.calibration.json")
    assert calibration_path("a/model-00001-of-00003.gguf") == Path("a/model.calibration.json")


# ---- a tiny model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its calibration beside it."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = folder / "model.gguf"
    shutil.copy(tiny_dual("qwen3moe"), model)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and is gone. " * 20, encoding="utf-8")
    assert main(["calibrate", str(model), "--text", str(folder / "text.txt"), *SMALL, "-q"]) == 0
    return model


SMALL = ["--tokens", "120", "-c", "64", "-t", "1", "--expert-cache", "100%"]


def loaded(model: Path, **kwargs: Any) -> Any:
    return load(Llama, str(model), 1, **{"offload": "hobbit", "expert_cache": "100%", **kwargs})


@quiet
def test_the_command_measures_what_eval_measures(calibrated: Path, tmp_path: Path, capsys: Captured) -> None:
    found = Calibration.load(calibration_path(calibrated))
    curve = found.curve
    assert len(curve.points) == len(cv.LOW_SHARES) * len(cv.SKIPPED_SHARES) - 1
    for p in curve.points:
        np.testing.assert_allclose(p.served, curve.shares(p.low, p.skipped), atol=0.02)
    assert found.text["tokens"] == 120 and found.low_types and found.fingerprint.startswith("sha256:")
    assert curve.low_cost == pytest.approx(18 / 34)
    llm = loaded(calibrated)
    assert len(curve.sensitivity) == llm.offload_info.n_moe_layer and max(curve.sensitivity) == 1
    llm.close()
    point = next(p for p in curve.points if (p.low, p.skipped) == (1.0, 0.15))
    args = ["eval", str(calibrated), "--text", str(calibrated.parent / "text.txt"), "--tokens", "120", "-c", "64", "-t", "1"]
    args += ["-tb", "1", "--warmup", "0", "--expert-cache", "100%", "--json", str(tmp_path / "a.json")]
    assert curve.frontier[-1][2:] == (point.low, point.skipped)
    assert main([*args, "--quality", "1000%", "--against", "exact,weight"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert rows[0]["text"]["perplexity"]["value"] == pytest.approx(found.text["perplexity"], rel=1e-3)
    assert rows[1]["text"]["kl"]["value"] == pytest.approx(point.kl, rel=0.02, abs=1e-6)
    assert rows[1]["text"]["loss"]["value"] == pytest.approx(point.loss, abs=2e-4)


@quiet
def test_a_model_with_one_expert_a_token(tmp_path: Path, capsys: Captured) -> None:
    """Layers are low as a whole, those that mind it least first; nothing is skipped."""
    model, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    shutil.copy(tiny_architecture("llama4-top-1", "Q8_0", "Q4_0"), model)
    text.write_text("the quick brown fox jumps over the lazy dog and is gone. " * 20, encoding="utf-8")
    assert main(["calibrate", str(model), "--text", str(text), *SMALL]) == 0
    capsys.readouterr()
    curve = Calibration.load(calibration_path(model)).curve
    assert [p.skipped for p in curve.points] == [0] * (len(cv.LOW_SHARES) - 1)
    assert curve.points[-1].served == (0, 1, 0) and curve.points[-1].kl > 0
    assert curve.at_change(10) == (1, 0) and curve.at_asked(0.01) == (1, 0)
    llm = loaded(model, quality="1000%", precision_rule="weight")
    llm.eval(words(llm, 20))
    stats = llm.offload_stats()
    assert stats.hits_low + stats.loads_low == stats.selections > 0
    llm.close()


@pytest.mark.parametrize("name", ["grovemoe", "nemotron_h_moe"])
def test_layers_that_differ(name: str, tmp_path: Path) -> None:
    """In how many experts they have, and how many of them a token uses."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and is gone. " * 20, encoding="utf-8")
    out = tmp_path / "a.json"
    model = tiny_architecture(name, "Q8_0", "Q4_0")
    assert main(["calibrate", str(model), "--text", str(text), *SMALL, "-q", "-o", str(out)]) == 0
    curve = Calibration.load(out).curve
    for p in curve.points:
        if p.skipped == 0:
            np.testing.assert_allclose(p.served, curve.shares(p.low, p.skipped), atol=0.1)


def test_the_report_and_what_is_refused(calibrated: Path, tmp_path: Path, capsys: Captured) -> None:
    text = str(calibrated.parent / "text.txt")
    assert main(["calibrate", str(calibrated), "--text", text]) == 1
    assert "--force" in capsys.readouterr().err
    out = tmp_path / "b.json"
    assert main(["calibrate", str(calibrated), "--text", text, *SMALL, "--paper", "-o", str(out)]) == 0
    shown = capsys.readouterr()
    for word in ("perplexity in exact mode", "sensitivity of the MoE layers", "same top-1", "--quality", "paper", "eq. 3 with"):
        assert word in shown.out
    assert str(out) in shown.err and Calibration.load(out).thresholds == (0.6, 0.9)
    for args, message in (
        ([str(tiny("qwen3moe")), "--text", text], "hobbit convert"),
        ([str(calibrated), "--text", text, *SMALL[2:], "--tokens", "99999", "-f"], "too few"),
        ([str(calibrated), "--text", "no-such-file"], "no such file"),
        ([str(calibrated), "--text", text, "-o", "/no/such/folder/x"], "not a folder"),
    ):
        assert main(["calibrate", *args]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


@quiet
def test_quality_sets_thresholds(calibrated: Path) -> None:
    found = Calibration.load(calibration_path(calibrated))
    at = {q: found.curve.thresholds(*found.curve.at_change(float(q[:-1]) / 100)) for q in (DEFAULT, "0%", "1000%")}
    for kwargs, want in (
        ({}, at[DEFAULT]),
        ({"quality": "0%"}, (1.0, 1.0)),
        ({"quality": "1000%"}, at["1000%"]),
        ({"quality": "1000%", "precision_rule": "weight"}, at["1000%"]),
        ({"quality": "paper"}, found.thresholds),
        ({"quality": "exact"}, None),
        ({"calibration": False}, None),
        ({"offload": "lru"}, None),
        ({"offload": OffloadParams(t1=0.25, t2=0.5)}, (0.25, 0.5)),
    ):
        llm = loaded(calibrated, **kwargs)
        assert llm.offload_stats().thresholds == want, kwargs
        llm.close()


@quiet
def test_the_named_file_is_used_and_its_weights(calibrated: Path, tmp_path: Path) -> None:
    found = Calibration.load(calibration_path(calibrated))
    other = tmp_path / "other.json"
    other.write_text(replace(found, eviction_weights=(0.5, 0.5, 0, 0), thresholds=(0.125, 0.75)).to_json(), encoding="utf-8")
    params, _ = resolve(str(calibrated), OffloadParams(calibration=other, eviction="hobbit", quality="paper"))
    assert params.eviction_weights == (0.5, 0.5, 0, 0) and (params.t1, params.t2) == (0.125, 0.75)
    exact, _ = resolve(str(calibrated), OffloadParams(calibration=other, eviction="hobbit", exact=True))
    assert exact.eviction_weights == (0.5, 0.5, 0, 0) and exact.t1 is None
    own = OffloadParams(calibration=other, eviction="hobbit", eviction_weights=(1, 0, 0, 0))
    assert resolve(str(calibrated), own)[0].eviction_weights == (1, 0, 0, 0)
    with pytest.raises(ModelFileError, match="no-such-file"):
        loaded(calibrated, calibration=tmp_path / "no-such-file")


@quiet
def test_all_high_is_exact_and_all_low_is_all_but_the_first(calibrated: Path) -> None:
    llm = loaded(calibrated, calibration=False, precision_rule="weight")
    tokens = words(llm, 50)
    session = llm._session
    session.set_thresholds(1.0, 1.0)
    high = logits(llm, tokens, 10)
    llm.reset_offload_stats()
    session.set_thresholds(0.0, 1.0)
    low = logits(llm, tokens, 10)
    stats = llm.offload_stats()
    k = llm.offload_info.n_expert_used
    assert stats.hits_low + stats.loads_low == stats.selections * (k - 1) // k and stats.skips == 0
    n_layer = llm.offload_info.n_moe_layer
    session.set_sensitivity([1.0] * n_layer)
    llm.reset_offload_stats()
    assert not np.array_equal(logits(llm, tokens, 10), low)
    stats = llm.offload_stats()
    assert stats.hits_low + stats.loads_low == stats.selections, "by cost the first may be low too"
    assert stats.cost_asked == stats.cost_low > 0
    session.set_thresholds(0.5, 1.0)
    session.set_sensitivity([0.0] + [1e9] * (n_layer - 1))
    llm.reset_offload_stats()
    logits(llm, tokens, 10)
    by_layer = [layer.hits_low + layer.loads_low for layer in llm.offload_stats().layers]
    assert by_layer[0] == llm.offload_stats().layers[0].selections and not any(by_layer[1:])
    session.set_sensitivity(None)
    session.set_thresholds(0.0, 1.0)
    assert np.array_equal(logits(llm, tokens, 10), low), "eq. 2 again"
    for bad in ([1.0] * (n_layer + 1), [-1.0] * n_layer, [math.nan] * n_layer):
        with pytest.raises(ParameterError, match="sensitivity"):
            session.set_sensitivity(bad)
    with pytest.raises(ParameterError, match="t1"):
        session.set_thresholds(0.5, 0.4)
    llm.close()
    exact = loaded(calibrated, exact=True)
    assert np.array_equal(high, logits(exact, tokens, 10)) and not np.array_equal(high, low)
    exact.close()


@quiet
def test_bytes_a_token_are_held(calibrated: Path) -> None:
    llm = loaded(calibrated, calibration=False, expert_cache="40%")
    tokens = words(llm, 200)
    cycle = llm.offload_info.bytes_cycle
    llm.close()
    served = []
    for quality in (f"{cycle * 10 / 1e6:.6f}MB/token", f"{cycle * 0.01 / 1e6:.6f}MB/token"):
        llm = loaded(calibrated, quality=quality, expert_cache="40%")
        logits(llm, tokens, 1)
        stats = llm.offload_stats()
        served.append((stats.thresholds, stats.hits_low + stats.loads_low + stats.skips))
        llm.close()
    curve = Calibration.load(calibration_path(calibrated)).curve
    assert served[0] == ((1.0, 1.0), 0), "there is room for all"
    assert served[1][0] == curve.thresholds(*curve.frontier[-1][2:]) and served[1][1] > 0, "as little as can be"


@quiet
def test_without_a_calibration_the_error_says_what_to_run() -> None:
    for model, message in ((tiny_dual("mixtral"), "hobbit calibrate .*mixtral"), (tiny("mixtral"), "hobbit convert .*mixtral")):
        for quality in ("1%", "40MB/token"):
            with pytest.raises(ParameterError, match=message):
                loaded(model, quality=quality)
    llm = loaded(tiny_dual("mixtral"), quality="paper")
    assert llm.offload_stats().thresholds is None
    llm.close()


@quiet
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, fingerprint="sha256:" + "0" * 64).to_json(), "another model"),
        (lambda c: replace(c, low_types={"Q2_K": 3}).to_json(), "Q2_K; here are such in Q4_0"),
        (lambda c: c.to_json()[:500], "damaged"),
    ],
)
def test_one_that_does_not_fit_is_not_used(calibrated: Path, tmp_path: Path, change: Any, message: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(change(Calibration.load(calibration_path(calibrated))), encoding="utf-8")
    with pytest.warns(HobbitWarning, match=f"{message}.*not used"):
        llm = loaded(calibrated, calibration=bad)
    assert llm.offload_stats().thresholds is None
    llm.close()
    with pytest.warns(HobbitWarning), pytest.raises(ParameterError, match="hobbit calibrate"):
        loaded(calibrated, calibration=bad, quality="1%")


def test_inspect_shows_it(calibrated: Path, tmp_path: Path, capsys: Captured) -> None:
    facts = inspect_file(calibrated)["calibration"]
    assert facts["belongs"] and set(facts["qualities"]) == {"0.5%", "1%", "2%", "5%"}
    assert inspect_file(tiny("mixtral"))["calibration"] is None
    assert main(["inspect", str(calibrated)]) == 0
    assert "calibration" in capsys.readouterr().out
    other = tmp_path / "model.gguf"
    shutil.copy(tiny_dual("mixtral"), other)
    shutil.copy(calibration_path(calibrated), calibration_path(other))
    facts = inspect_file(other)["calibration"]
    assert not facts["belongs"] and "another model" in facts["reason"]
    assert main(["inspect", str(other)]) == 0
    assert "not used" in capsys.readouterr().out


@quiet
def test_the_flag(calibrated: Path, capsys: Captured) -> None:
    args = ["run", str(calibrated), "-p", "the fox", "-n", "4", "-c", "64", "-t", "1", "--expert-cache", "100%", "-no-cnv"]
    assert main([*args, "--quality", "2%"]) == 0
    for more, message in (
        (["--quality", "2%", "--calibration", "none"], "hobbit calibrate"),
        (["--quality", "x"], "quality 'x'"),
    ):
        assert main([*args, *more]) == 1
        assert message in capsys.readouterr().err
    assert asdict(OffloadParams())["quality"] is None
