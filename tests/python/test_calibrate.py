"""hobbit calibrate and quality=: eviction weights, the file, and tiny real models."""

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

from curves import made_up_curve
from decode import load, logits, words
from hobbit_cpp import CalibrationError, HobbitWarning, Llama, ModelFileError, OffloadParams, ParameterError
from hobbit_cpp._session import Session
from hobbit_cpp.calibrate import curve as cv
from hobbit_cpp.calibrate import measure as m
from hobbit_cpp.calibrate import weights as wt
from hobbit_cpp.calibrate.dial import DEFAULT, resolve
from hobbit_cpp.calibrate.store import Calibration, calibration_path
from hobbit_cpp.cli import main
from hobbit_cpp.evaluate import text as scoring
from hobbit_cpp.inspection import inspect_file
from hobbit_cpp.trace import Trace
from models import tiny, tiny_architecture, tiny_dual

quiet = pytest.mark.filterwarnings("ignore:the expert pool holds:hobbit_cpp.HobbitWarning")
Captured = pytest.CaptureFixture[str]


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
    text = calibrated.parent / "text.txt"
    # it measures at the end of the text; two windows of 64 tokens, of which the first is the model's own or not scored
    n_before = len(llm.tokenize(text.read_bytes(), add_bos=False, special=False)) - (120 if llm._model.add_bos_token() else 122)
    llm.close()
    point = next(p for p in curve.points if (p.low, p.skipped) == (1.0, 0.15))
    args = ["eval", str(calibrated), "--text", str(text), "--tokens", "120", "-c", "64", "-t", "1"]
    args += ["-tb", "1", "--warmup", str(n_before), "--expert-cache", "100%", "--json", str(tmp_path / "a.json")]
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


def test_a_layer_is_measured_low_and_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips: List[int] = []
    score = scoring.score_text

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        before = model.counts().skips
        out = score(model, *args, **kwargs)
        skips.append(model.counts().skips - before)
        return out

    monkeypatch.setattr(scoring, "score_text", spy)
    text = tmp_path / "t.txt"
    text.write_text("the expert of the layer and the token in the wood " * 60)
    model = tiny_dual("mixtral")
    m.calibrate(model, text, n_tokens=60, window=30, threads=1, expert_cache="100%")
    n_layer = Session(str(model), OffloadParams()).info.n_moe_layer
    assert skips[: 1 + n_layer] == [0] * (1 + n_layer)
