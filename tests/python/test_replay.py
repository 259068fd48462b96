"""Replays: against plain implementations of the policies, and against the engine on a model that follows the same trace."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set

import numpy as np
import pytest

import cache_models as plain
from decode import load, words
from hobbit_cpp import Llama, MemoryBudgetError, OffloadParams, ParameterError
from hobbit_cpp._session import Session
from hobbit_cpp.cli import main
from hobbit_cpp.replay import POLICIES, Replay, ReplayRow, ReplaySettings, parse_cache
from hobbit_cpp.trace import Trace
from models import tiny_dual

EXACT = ReplaySettings(exact=True)
PAGE = 4096
COUNTS = ("selections", "hits_high", "hits_low", "loads_high", "loads_low", "skips")


def make_trace(kind: str, tokens: int = 240, layers: int = 4, experts: int = 12, k: int = 3, seed: int = 0) -> Trace:
    """random: all alike; zipf: some are popular; drift: favourites that change; cycle: each expert in turn, LRU's
    worst case; subjects: other favourites every 60 tokens, and nothing of before."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(tokens, layers, experts))
    if kind == "zipf":
        noise += -1.2 * np.log(np.arange(experts) + 1)
    elif kind == "drift":
        centre = np.cumsum(rng.normal(size=(tokens, layers, 1)) * 0.4, axis=0)
        noise += 4 * np.cos((np.arange(experts) - centre) * 2 * np.pi / experts)
    elif kind == "subjects":
        subject = np.arange(tokens)[:, None, None] // 60
        favourites = rng.permuted(np.tile(np.arange(experts), (tokens // 60 + 1, layers, 1)), axis=-1)[subject[:, 0, 0]] < 2 * k
        noise += np.where(favourites, 8.0, 0.0)
    elif kind == "cycle":
        noise = -((np.arange(experts) - np.arange(tokens)[:, None, None] * k) % experts) * np.ones((1, layers, 1))
    ids = np.argsort(-noise, axis=-1, kind="stable")[..., :k].astype(np.uint8)
    weights = rng.exponential(size=ids.shape).astype(np.float32) + 0.01
    lens = [tokens // 3, tokens // 6, tokens - tokens // 3 - tokens // 6]
    return Trace(ids, weights, np.array(lens, np.int32), experts)


KINDS = ("random", "zipf", "drift", "cycle")
SLOTS = (4, 7, 12, 21, 40)


def run(trace: Trace, policy: str, slots: int, settings: ReplaySettings = EXACT, **sizes: Any) -> ReplayRow:
    return Replay(trace, **sizes).run(policy, slots / (trace.n_layers * trace.n_experts), settings)


# ---- the policies ----------------------------------------------------------------------------------------------------

REFERENCE: Dict[str, Callable[[Trace, int], int]] = {
    "lru": plain.lru,
    "layer-lru": plain.layer_lru,
    "lfu": plain.lfu,
    "belady": plain.belady,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", sorted(REFERENCE))
def test_a_textbook_cache_hits_what_a_plain_one_hits(policy: str, kind: str) -> None:
    trace = make_trace(kind)
    for slots in SLOTS:
        row = run(trace, policy, slots)
        assert row.hits_high == REFERENCE[policy](trace, slots), slots
        assert row.selections == trace.ids.size and row.hits_high + row.loads_high == row.selections
        assert row.bytes == row.loads_high * Replay(trace).bytes_high
        assert row.miss_penalty == pytest.approx(1 - row.hit_rate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uses", ["trace", "sequence"])
def test_lfu_and_lcu_with_uses_of_a_trace_and_of_a_sequence(kind: str, uses: str) -> None:
    trace = make_trace(kind, tokens=150)
    settings = ReplaySettings(exact=True, accesses="selection", uses=uses)
    for slots in (7, 21):
        for policy, reference in (("lfu", plain.lfu), ("lcu", plain.lcu)):
            want = reference(trace, slots, uses == "sequence") / trace.ids.size
            assert run(trace, policy, slots, settings).hit_rate == pytest.approx(want, abs=1e-3), (policy, slots)


@pytest.mark.parametrize("kind", KINDS)
def test_arc_is_that_of_the_paper(kind: str) -> None:
    trace = make_trace(kind, tokens=400)
    settings = ReplaySettings(exact=True, accesses="selection")
    for slots in (12, 20, 33):
        assert run(trace, "layer-arc", slots, settings).hits_high == plain.layer_arc(trace, slots), slots


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_at_a_time_pins_what_is_there(kind: str) -> None:
    trace = make_trace(kind)
    for slots in SLOTS:
        row = run(trace, "lru", slots, ReplaySettings(exact=True, accesses="layer"))
        assert row.hits_high == plain.lru_by_layer(trace, slots), slots


def test_fate_holds_the_first_layers_whole() -> None:
    trace = make_trace("random", layers=8)
    row = run(trace, "fate", 4 * 12 + 4 * 3)
    assert row.precision == "exact" and row.prefetch == 0
    shallow = Trace(trace.ids[:, :4], trace.weights[:, :4], trace.lens, 12)
    deep = Trace(trace.ids[:, 4:], trace.weights[:, 4:], trace.lens, 12)
    first = len(np.unique(shallow.ids[:, 0]))
    assert first == 12
    by_layer = ReplaySettings(exact=True, accesses="layer")
    assert row.loads_high == 4 * 12 + run(deep, "layer-arc", 12, by_layer).loads_high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_nothing_reads_less_than_the_bound(kind: str, exact: bool) -> None:
    trace = make_trace(kind)
    replay = Replay(trace, bytes_high=4 * PAGE, bytes_low=2 * PAGE)
    for slots in (12, 24, 40):
        rows = replay.table(POLICIES, [slots / 48], ReplaySettings(exact=exact))
        bound = {row.policy: row for row in rows}["belady"]
        for row in rows:
            assert row.precision == "demand" or row.bytes >= bound.bytes, row.policy
            assert row.gap_closed is None or row.gap_closed <= 1 + 1e-9
            assert row.selections == trace.ids.size
        assert {row.policy: row.gap_closed for row in rows}["lru"] == 0


def needs_of(trace: Trace, t1: float, t2: float) -> List[List[str]]:
    """HOBBIT eq. 2 for each token and layer, in the order of the ids."""
    out = []
    for weights in trace.weights.reshape(-1, trace.k).astype(np.float64):
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        score = np.empty(trace.k)
        score[order] = before / weights.sum()
        out.append(["high" if i == order[0] or s <= t1 else "low" if s <= t2 else "skip" for i, s in enumerate(score)])
    return out


@pytest.mark.parametrize("kind", ["zipf", "drift"])
def test_the_bound_for_two_sizes_is_the_optimum_of_bytes(kind: str) -> None:
    trace = make_trace(kind, tokens=80, layers=2, experts=6)
    settings = ReplaySettings(params=OffloadParams(t1=0.5, t2=0.8))
    requests: List[Optional[Set[Any]]] = []
    skips = 0
    keys = [key for _, _, key in plain.accesses(trace)]
    for key, need in zip(keys, (n for needs in needs_of(trace, 0.5, 0.8) for n in needs)):
        size = {"high": 5, "low": 2, "skip": 0}[need]
        skips += need == "skip"
        requests.append({(key, page) for page in range(size)} if size else None)
    for slots in (4, 6, 9):
        row = run(trace, "belady", slots, settings, bytes_high=5 * PAGE, bytes_low=2 * PAGE)
        assert row.bytes == PAGE * plain.page_belady(requests, 5 * slots)
        assert row.skips == skips > 0


@pytest.mark.parametrize("settings", [EXACT, ReplaySettings()], ids=["exact", "two"])
@pytest.mark.parametrize("change", ["subjects", "twice"])
def test_where_the_past_tells_nothing_the_default_is_about_lru(change: str, settings: ReplaySettings) -> None:
    trace = make_trace("subjects", 2400, 6, 32, 3) if change == "subjects" else make_trace("zipf", 1200, 6, 32, 3)
    if change == "twice":  # each token
        trace = Trace(trace.ids.repeat(2, 0), trace.weights.repeat(2, 0), trace.lens * 2, trace.n_experts)
    for share in (0.125, 0.25, 0.5):
        lru, default = (Replay(trace).run(policy, share, settings).miss_penalty for policy in ("lru", "default"))
        assert default < 1.1 * lru, (share, default, lru)


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
@pytest.mark.parametrize("shape", ["mixtral", "qwen3moe"])
@pytest.mark.parametrize("rule", ["exact", "miss", "weight"])
@pytest.mark.parametrize("policy", ["default", "lru", "layer-arc"])
def test_a_model_that_follows_the_trace_counts_the_same(shape: str, rule: str, policy: str) -> None:
    path = tiny_dual(shape)
    info = Session(str(path), OffloadParams()).info
    trace = make_trace("drift", 60, info.n_moe_layer, info.n_expert, info.n_expert_used)
    common: Dict[str, Any] = {} if rule == "exact" else {"t1": 0.4, "t2": 0.75, "low_share": 0.2}
    pool = info.pool_min + 2 * info.n_moe_layer * info.slot_high
    settings = ReplaySettings(
        exact=rule == "exact",
        precision_rule=rule if rule == "weight" else "miss",
        accesses="layer",
        uses="sequence",
        prefetch=0,
        params=OffloadParams(**common),
    )
    row = Replay(trace, model=path).run(policy, 0.0, settings, pool_bytes=pool)

    given = {**common, "prefetch_depth": 0, "expert_cache": pool, "exact": rule == "exact"}
    given.update({} if policy == "default" else {"eviction": policy})
    given.update({"precision_rule": "weight"} if rule == "weight" else {})
    llm = load(Llama, str(path), 1, offload=OffloadParams(**given))
    llm.set_routing(trace)
    for n in trace.lens:
        llm.reset()
        for token in words(llm, int(n)):
            llm.eval([token])
    stats = llm.offload_stats()
    llm.close()
    for name in COUNTS:
        assert getattr(row, name) == getattr(stats, name), name
    assert row.bytes == stats.bytes_read
    assert row.hit_rate == stats.hit_rate and 0 < row.hit_rate < 1
    assert rule == "exact" or (row.loads_low > 0 and row.skips > 0)


def test_default_is_what_is_used_when_nothing_is_said() -> None:
    trace = make_trace("zipf").with_predictions(0.9)
    row = run(trace, "default", 20, ReplaySettings())
    same = run(trace, "foresight", 20, ReplaySettings(prefetch=1))
    assert row.prefetch == 1 and row.precision == "miss" and row.prefetches > 0
    assert {k: v for k, v in asdict(row).items() if k != "policy"} == {k: v for k, v in asdict(same).items() if k != "policy"}


# ---- reading ahead, and the clock ------------------------------------------------------------------------------------


def test_right_predictions_are_useful_and_wrong_ones_wasted() -> None:
    trace = make_trace("random", tokens=200)
    alone = run(trace, "lru", 24, ReplaySettings(exact=True, prefetch=0, accesses="layer"))
    right = run(trace.with_predictions(1.0), "lru", 24, ReplaySettings(exact=True, prefetch=1))
    wrong = run(trace.with_predictions(0.0), "lru", 24, ReplaySettings(exact=True, prefetch=1))
    assert right.prefetches_useful > 0 and right.prefetches_wasted == 0 == right.bytes_wasted
    assert right.loads_high < 0.6 * alone.loads_high
    assert wrong.prefetches_useful < 0.02 * wrong.prefetches and wrong.bytes_wasted > 0.9 * wrong.bytes_prefetch > 0
    assert wrong.bytes > alone.bytes
    for row in (right, wrong):
        assert row.prefetches_useful + row.prefetches_late + row.prefetches_wasted <= row.prefetches


def timed(trace: Trace, slots: int, latency: float = 0.0, policy: str = "lcu", bandwidth: float = 1e9, **more: Any) -> ReplayRow:
    settings = ReplaySettings(exact=True, bandwidth=bandwidth, latency=latency, **more)
    return run(trace, policy, slots, settings, bytes_high=1 << 20)


def seconds(row: ReplayRow) -> float:
    assert row.tokens_per_second is not None
    return row.tokens / row.tokens_per_second


def test_the_clock_by_hand() -> None:
    trace = make_trace("random", tokens=50)
    row = timed(trace, 12)
    assert seconds(row) == pytest.approx(row.bytes / 1e9)  # nothing but reads
    assert row.stall_share == pytest.approx(1.0)
    one = timed(trace, 12, latency=1e-3, params=OffloadParams(io_threads=1))
    assert seconds(one) == pytest.approx(one.loads_high * 1e-3 + one.bytes / 1e9)
    deep = timed(trace, 12, latency=1e-3)
    assert seconds(one) > seconds(deep) > seconds(row)
    whole = timed(trace, 48, token_ms=8.0, bandwidth=1e15)
    assert seconds(whole) == pytest.approx(50 * 8e-3, rel=1e-3)
    roof, both = (timed(trace, 12, policy=policy, token_ms=8.0) for policy in ("belady", "lcu"))
    # Between perfect overlap and one after the other.
    assert seconds(roof) < max(50 * 8e-3, both.bytes / 1e9) <= seconds(both) <= 50 * 8e-3 + both.bytes / 1e9


def test_a_textbook_cache_keeps_its_counts_with_a_clock() -> None:
    trace = make_trace("drift")
    assert timed(trace, 12, policy="lru").hits_high == run(trace, "lru", 12).hits_high


def test_late_reads_are_completed_and_counted() -> None:
    trace = make_trace("random", tokens=200).with_predictions(1.0)
    settings = ReplaySettings(exact=True, prefetch=1, token_ms=4.0, bandwidth=2e9, latency=1e-4)
    row = run(trace, "lcu", 12, settings, bytes_high=1 << 20)
    assert row.prefetches_late > 0
    assert row.prefetches_useful + row.prefetches_late + row.prefetches_wasted <= row.prefetches
    # each expert that is read is read whole, once
    assert row.prefetches_wasted == 0
    assert row.bytes == (row.loads_high + row.prefetches_useful + row.prefetches_late) << 20
    assert row.hit_rate == pytest.approx((row.hits_high + row.hits_low - row.prefetches_late) / row.selections)


# ---- the command, and what is refused --------------------------------------------------------------------------------


def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = make_trace("drift")
    trace.save(tmp_path / "a.npz")
    out = tmp_path / "a.json"
    argv = ["replay", str(tmp_path / "a.npz"), "--cache", "25%,0.5", "--policy", "lru,lcu,default,belady", "--json", str(out)]
    assert main([*argv, "--exact"]) == 0
    said = capsys.readouterr()
    assert "closed" in said.out and "25 %" in said.out and "belady" in said.out and said.err == ""
    data = json.loads(out.read_text())
    assert [(row["cache"], row["policy"]) for row in data["rows"]] == [
        (c, p) for c in (0.25, 0.5) for p in ("lru", "lcu", "default", "belady")
    ]
    assert {"policy", "cache", "hit_rate", "miss_penalty", "bytes", "gap_closed"} <= set(data["rows"][0])
    assert data["rows"][0]["hits_high"] == plain.lru(trace, 12) and data["rows"][0]["gap_closed"] == 0
    assert data["rows"][3]["gap_closed"] == 1 and data["trace"]["tokens"] == trace.n_tokens
    extra = ["--bandwidth", "1", "--compute", "5", "--recall", "0.8", "--tokens", "90", "--queue-depth", "4"]
    assert main([*argv, *extra]) == 0
    data = json.loads(out.read_text())
    assert data["trace"]["tokens"] == 90 and data["rows"][2]["prefetches"] > 0
    assert all(row["tokens_per_second"] > 0 for row in data["rows"])
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv,says",
    [
        (["none.npz"], "none.npz"),
        (["bad.npz"], "not a trace"),
        (["a.npz", "--policy", "lru,best"], "no policy 'best'; there are: lru"),
        (["a.npz", "--cache", "120%"], "'120%' is not a share"),
        (["a.npz", "--cache", "1%"], "too small"),
        (["a.npz", "--prefetch", "2"], "--recall"),
        (["a.npz", "--recall", "2"], "recall is a share"),
        (["a.npz", "--accesses", "selection"], "one precision"),
        (["a.npz", "--bandwidth", "0"], "reads nothing"),
        (["a.npz", "--high-bytes", "1MiB", "--low-bytes", "2MiB"], "no model has"),
        (["a.npz", "--json", "no/folder/x.json"], "not a folder"),
        (["a.npz", "--model", "none.gguf"], "none.gguf"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: List[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trace("random").save("a.npz")
    Path("bad.npz").write_text("text")
    assert main(["replay", *argv]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_model_of_another_shape_is_refused() -> None:
    info = Session(str(tiny_dual("mixtral")), OffloadParams()).info
    trace = make_trace("random", layers=info.n_moe_layer + 1, experts=info.n_expert, k=info.n_expert_used)
    with pytest.raises(ParameterError, match="layers"):
        Replay(trace, model=tiny_dual("mixtral"))
    with pytest.raises(MemoryBudgetError):
        run(make_trace("random"), "lru", 2)


@pytest.mark.parametrize("text,share", [("25%", 0.25), ("0.5", 0.5), ("12.5%", 0.125), ("1", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_cache(text) == share


def test_a_low_miss_costs_its_bytes() -> None:
    settings = ReplaySettings(prefetch=0, params=OffloadParams(t1=0.4, t2=0.75, low_share=0.2))
    row = run(make_trace("drift"), "lru", 12, settings, bytes_high=1 << 20, bytes_low=1 << 18)
    assert row.loads_low > 0 and row.loads_high > 0
    assert row.miss_penalty == pytest.approx((row.loads_high + row.loads_low / 4) / row.selections)


def test_another_precision_rule_has_no_gap() -> None:
    rows = Replay(make_trace("drift")).table(["fate", "lru"], [0.25], ReplaySettings())
    assert rows[0].precision != rows[1].precision and rows[0].gap_closed is None


def test_the_optimum_reads_nothing_ahead() -> None:
    row = run(make_trace("drift"), "belady", 12, ReplaySettings(exact=True, prefetch=1))
    assert row.prefetch == 0
