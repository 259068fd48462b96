"""hobbit plan: what it says about memory holds, its forecasts follow from what they are made of, and it reads no weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import pytest

from curves import made_up_curve
from hobbit_cpp import Llama, probe
from hobbit_cpp._memory import resident
from hobbit_cpp.bench import forecast as fc
from hobbit_cpp.bench import plan as pl
from hobbit_cpp.bench.forecast import Compute, Machine, forecast
from hobbit_cpp.bench.routing import Loads, expected_loads
from hobbit_cpp.bench.sizes import Sizes, Weights, measure_sizes, read_weights
from hobbit_cpp.cli import main
from hobbit_cpp.convert.header import Value
from hobbit_cpp.probe import DiskProbe
from models import tiny, tiny_dual

GIB = 1 << 30
FAST = DiskProbe(500_000, {1: 0.5e9, 2: 0.9e9, 4: 1.3e9, 8: 1.5e9, 16: 1.5e9}, True, 0.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("hobbit_cpp.probe._DISK_SECONDS", 0.01)
    monkeypatch.setattr("hobbit_cpp.probe._COMPUTE_SECONDS", 0.01)


# ---- memory ----

MEASURE = """
import json, sys
from hobbit_cpp import Llama, _memory
llm = Llama(sys.argv[1], offload="hobbit", memory=int(sys.argv[2]), n_ctx=int(sys.argv[3]), n_batch=128, n_ubatch=128,
            n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
tokens = (llm.tokenize(b"the expert of the layer and the token in the wood ") * 100)[: int(sys.argv[3]) - 8]
llm.eval(tokens)
s = llm.offload_stats()
print(json.dumps({"pool": s.pool_bytes, "peak": s.peak_memory, "slots": s.slots_high}))
"""


@pytest.mark.parametrize("shape, n_ctx", [("mixtral", 512), ("deepseek2", 512), ("qwen3moe", 2048)])
def test_memory_is_as_planned(shape: str, n_ctx: int) -> None:
    path = tiny_dual(shape)
    budget = 110 << 20
    # in a process of its own, as a user: this one holds pytest and more
    command = [sys.executable, "-m", "hobbit_cpp", "plan", str(path), "--memory", str(budget), "-c", str(n_ctx), "-t", "1"]
    said = subprocess.run([*command, "-b", "128", "-ub", "128", "--json", "-"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    plan = json.loads(said.stdout)
    assert plan["budget"] == budget and sum(v for k, v in plan["memory"].items() if k != "n_ctx") == budget
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), str(budget), str(n_ctx)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout.strip().splitlines()[-1])
    assert real["peak"] <= budget
    planned = plan["forecasts"][0]["peak"]
    assert abs(real["peak"] - planned) < 0.1 * planned, (real, plan["memory"])


def test_the_smallest_budget_works_and_less_does_not() -> None:
    path = tiny_dual("mixtral")
    command = [sys.executable, "-m", "hobbit_cpp", "plan", str(path), "--memory", "110MiB", "-c", "512", "-t", "1"]
    said = subprocess.run([*command, "-b", "128", "-ub", "128", "--json", "-"], capture_output=True, text=True)
    smallest = json.loads(said.stdout)["smallest"]
    for memory, works in ((smallest + (6 << 20), True), (smallest - (12 << 20), False)):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path), str(memory), "512"], capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr
        if not works:
            assert "too small" in done.stderr


def test_flash_attention_leaves_more_of_a_long_context() -> None:
    flash, plain = (measure_sizes(tiny("mixtral"), 8192, 512, 512, 1, flash_attn=on) for on in (True, False))
    assert flash.buffers + flash.prompt < (plain.buffers + plain.prompt) / 2 and flash.kv == plain.kv


def test_embeddings_stay_on_disk_where_memory_is_short(large_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = measure_sizes(large_model, 256, 64, 64, 1)
    assert in_memory.embeddings == 0, "so few are not worth a read"
    monkeypatch.setattr("hobbit_cpp._budget._FEW_EMBEDDINGS", 1)
    on_disk = measure_sizes(large_model, 256, 64, 64, 1)
    info = on_disk.info
    assert on_disk.embeddings == info.bytes_embeddings - info.bytes_rows_kept and info.bytes_rows_kept <= 4 << 20
    assert on_disk.dense + on_disk.embeddings == in_memory.dense and on_disk.largest > on_disk.budget(info.pool_max)
    for pool, expected in ((info.pool_max // 3, True), (2 * info.pool_max, False)):
        memory = resident() + info.bytes_dense + (60 << 20) + pool
        llm = Llama(str(large_model), offload="hobbit", exact=True, memory=memory, n_ctx=256, verbose=False)
        assert llm._session is not None and llm._session.embeddings_on_disk is expected
        llm.close()
    # Everything would fit, but for the context.
    memory = int(1.1 * (resident() + info.bytes_dense + info.pool_max)) + (8 << 20)
    llm = Llama(str(large_model), offload="hobbit", exact=True, memory=memory, n_ctx=8192, flash_attn=True, verbose=False)
    stats, session = llm.offload_stats(), llm._session
    assert session is not None and session.embeddings_on_disk and info.pool_max // 3 < stats.pool_bytes < info.pool_max
    llm.eval(llm.tokenize(b"the fox runs"))
    assert resident() <= stats.memory_budget == memory
    llm.close()


def test_a_larger_context_takes_more() -> None:
    small, large = (measure_sizes(tiny("mixtral"), n, 64, 64, 1) for n in (256, 2048))
    assert large.kv == 8 * small.kv > 0 and large.dense == small.dense
    assert small.largest >= small.budget(small.info.pool_max + small.prompt) > small.smallest > small.budget(small.info.pool_min)
    assert small.pool(small.budget(1 << 20)) in range((1 << 20) - 4, (1 << 20) + 4)


# ---- forecasts ----


def model(n_expert: int = 64, used: int = 4, **more: Any) -> Sizes:
    """A model of a GiB of experts, in sizes alone."""
    info = measure_sizes(tiny("mixtral"), 256, 64, 64, 1).info
    slot = GIB // (32 * n_expert)
    info = dataclasses.replace(
        info, n_layer=32, n_moe_layer=32, n_expert=n_expert, n_expert_used=used, bytes_high=GIB,
        bytes_expert_high=slot, slot_high=slot, bytes_cycle=32 * used * slot,
        pool_min=used * slot + 4 * slot, pool_max=GIB + 4 * slot, **more,
    )  # fmt: skip
    return Sizes(info, 256, 60 << 20, 100 << 20, 0, 10 << 20, 10 << 20, 40 << 20, 40 << 20)


def machine(disk: DiskProbe = FAST) -> Machine:
    return Machine(disk, None, Compute(0.002, 0.008, "estimated"), 2)


WEIGHTS = Weights([], [], 32, False, "a model")


NOISY = DiskProbe(500_000, {1: 1e7, 2: 2e7, 4: 8e7, 8: 3e7, 16: 9e7}, True, 0.0)


@pytest.mark.parametrize("disk", [FAST, NOISY], ids=["fast", "noisy"])
def test_more_memory_is_never_slower(disk: DiskProbe) -> None:
    sizes = model()
    for mode in ("lru", "exact", "hobbit"):
        budgets = range(sizes.smallest, sizes.largest, 32 << 20)
        speeds = [forecast(sizes, WEIGHTS, machine(disk), budget, mode) for budget in budgets]
        assert all(a.tok_s <= b.tok_s * 1.0001 and a.mb_token >= b.mb_token for a, b in zip(speeds, speeds[1:]))
        assert all(f.tok_s_low <= f.tok_s <= f.tok_s_high for f in speeds)


def test_with_everything_in_memory_the_cores_are_the_limit() -> None:
    sizes = model()
    f = forecast(sizes, WEIGHTS, machine(), sizes.largest, "exact", None)
    assert (f.share, f.hit_rate, f.mb_token) == (1.0, 1.0, 0.0) and f.tok_s == pytest.approx(100)


def test_half_the_disk_is_about_half_the_speed_where_it_is_the_limit() -> None:
    sizes = model()
    slow = DiskProbe(500_000, {depth: rate / 10 for depth, rate in FAST.bandwidth.items()}, True, 0.0)
    slower = DiskProbe(500_000, {depth: rate / 20 for depth, rate in FAST.bandwidth.items()}, True, 0.0)
    a, b = (forecast(sizes, WEIGHTS, machine(disk), sizes.budget(GIB // 4), "lru").tok_s for disk in (slow, slower))
    assert 1.8 < a / b < 2.05


def test_low_copies_save_bytes_and_a_short_run_costs_more() -> None:
    sizes = model(has_low=True, bytes_low=GIB // 2, bytes_expert_low=GIB // (64 * 64), slot_low=GIB // (64 * 64))
    budget = sizes.budget(GIB // 4)
    exact, hobbit = (forecast(sizes, WEIGHTS, machine(), budget, mode) for mode in ("exact", "hobbit"))
    assert hobbit.mb_token < 0.9 * exact.mb_token and hobbit.loads.low > 0 and exact.loads.low == 0
    short, long = (forecast(sizes, WEIGHTS, machine(), budget, "exact", n) for n in (128, None))
    assert short.mb_token > exact.mb_token > long.mb_token and short.hit_rate < long.hit_rate


def test_a_calibration_says_how_much_may_be_low() -> None:
    sizes = model(has_low=True, bytes_low=GIB // 2, bytes_expert_low=GIB // (64 * 64), slot_low=GIB // (64 * 64))
    budget = sizes.budget(GIB // 4)

    def at(loss: float) -> Any:
        curve = made_up_curve(kl=lambda low, skipped: loss * low + 10 * loss * skipped)
        return forecast(sizes, dataclasses.replace(WEIGHTS, curve=curve), machine(), budget, "hobbit")

    without, dear, cheap = forecast(sizes, WEIGHTS, machine(), budget, "hobbit"), at(1.0), at(0.01)
    assert cheap.loads.low > without.loads.low > dear.loads.low
    assert cheap.mb_token < without.mb_token < dear.mb_token
    for f in (dear, cheap):
        assert f.loads.hit_rate == pytest.approx(without.loads.hit_rate)
    exact = dataclasses.replace(WEIGHTS, curve=made_up_curve())
    assert forecast(sizes, exact, machine(), budget, "exact") == forecast(sizes, WEIGHTS, machine(), budget, "exact")


def test_random_weights_have_no_locality() -> None:
    noise = dataclasses.replace(WEIGHTS, random=True)
    sizes = model()
    f = forecast(sizes, noise, machine(), sizes.budget(GIB // 2), "exact")
    assert f.hit_rate == pytest.approx(f.share, abs=1e-6)
    # nor can anything be read ahead
    real = forecast(sizes, WEIGHTS, machine(), sizes.budget(GIB // 2), "exact", predicts=False)
    for unpredicted, weights in ((f, noise), (real, WEIGHTS)):
        ahead = forecast(sizes, weights, machine(), sizes.budget(GIB // 2), "exact", predicts=True)
        assert (ahead.tok_s > unpredicted.tok_s) is not weights.random
        disk_ms = unpredicted.mb_token / 1e3 / (unpredicted.mb_token / unpredicted.disk_ms) * 1e3
        assert 1e3 / unpredicted.tok_s >= disk_ms


def test_a_forecast_is_of_the_tokens_that_are_measured() -> None:
    """The first tokens find nothing in the cache and have to be read: not those after a prompt."""
    whole, rest, late = (
        expected_loads(64, 4, 0.25, "exact", n, after=after)[0].high for n, after in ((256, 0), (128, 128), (128, 256))
    )
    long = expected_loads(64, 4, 0.25, "exact")[0].high
    assert whole > long == late and long < expected_loads(64, 4, 0.25, "exact", 256, after=128)[0].high < whole
    assert rest == whole, "early are the first 256"


@pytest.mark.parametrize("rule", ["lru", "exact", "hobbit"])
@pytest.mark.parametrize("n_expert, used", [(8, 2), (32, 4), (64, 6), (128, 8), (512, 10)])
def test_statistics_cover_every_model_and_share(n_expert: int, used: int, rule: str) -> None:
    before = 1.1
    for share in (0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        for loads in (all_loads := expected_loads(n_expert, used, share, rule)):
            assert 0 <= loads.hit_rate <= 1 and loads.high >= 0 and loads.low >= 0 and loads.skip >= 0
        assert all_loads[0].bytes(0.5) <= before
        before = all_loads[0].bytes(0.5)
    assert expected_loads(n_expert, used, 1.0, rule)[0].hit_rate > 0.999


def test_a_cache_below_one_token_gives_lru_nothing() -> None:
    assert expected_loads(64, 6, 0.08, "lru")[0].hit_rate == 0
    assert expected_loads(64, 6, 0.08, "exact")[0].hit_rate > 0.1


# ---- the command ----


def run_plan(path: Path, *arguments: str) -> Dict[str, Any]:
    out = path.with_name(f"plan-{path.stem}.json")
    try:
        main(["plan", str(path), "-t", "1", *arguments, "--json", str(out)])
        document: Dict[str, Any] = json.loads(out.read_text())
        return document
    finally:
        out.unlink(missing_ok=True)


def test_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = run_plan(tiny_dual("mixtral"), "--memory", "88MiB", "-c", "512")
    assert set(plan) == {
        "format", "model", "name", "budget", "free", "fits", "problem", "smallest", "largest", "memory", "experts", "disk",
        "compute", "forecasts", "table", "choices", "command", "notes", "prompt", "embeddings",
    }  # fmt: skip
    assert {f["mode"] for f in plan["forecasts"]} == {"hobbit", "exact", "lru"}
    assert [f["budget"] for f in plan["table"]] == sorted(f["budget"] for f in plan["table"])
    assert plan["choices"][0]["setting"] == "offload" and plan["choices"][0]["why"]
    out = capsys.readouterr().out
    for word in ("dense weights", "KV cache", "tokens/s", "MB a token", "what memory buys", "hobbit run", "GB/s in reads"):
        assert word in out


def test_everything_fits() -> None:
    plan = run_plan(tiny_dual("mixtral"), "--memory", "2GiB")
    assert plan["fits"] and plan["experts"]["share_resident"] == 1 and plan["choices"][0]["value"] == "exact"


def test_too_little_is_told_with_what_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny("mixtral")
    assert main(["plan", str(path), "--memory", "20MiB", "-t", "1", "-c", "256", "512"]) == 1
    out = capsys.readouterr().out
    assert out.count("does not fit") == 2 and "the smallest that works is" in out


def test_memory_that_others_hold_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hobbit_cpp._memory.available", lambda: 1 << 20)
    plan = run_plan(tiny("mixtral"), "--memory", "900MiB")
    assert not plan["fits"] and "more than is free" in plan["problem"]


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"no GGUF" * 100)
    for arguments, says in (
        ([str(tmp_path / "absent.gguf")], "no such file"),
        ([str(junk)], "GGUF"),
        ([str(tiny("mixtral")), "--memory", "lots"], "is not a size"),
    ):
        assert main(["plan", *arguments]) == 1
        err = capsys.readouterr().err
        assert says in err and len(err.strip().splitlines()) == 1
    for arguments, says in (
        (["-c", "-5"], "-5 is negative"),
        (["-c", "4294967296"], "is too large"),
        (["-t", "0"], "0 is not a positive number"),
    ):
        assert main(["plan", str(tiny("mixtral")), *arguments]) == 2
        assert says in capsys.readouterr().err


def test_more_memory_than_there_is_brings_no_more() -> None:
    plan = run_plan(tiny("mixtral"), "--memory", "99999GiB")
    assert plan["fits"] and any("bring no more" in note for note in plan["notes"])
    assert "99999" not in plan["command"] and sum(v for k, v in plan["memory"].items() if k != "n_ctx") < 1 << 45


def test_products_of_a_token() -> None:
    path = tiny_dual("mixtral")
    weights = read_weights(path, 2)
    (experts,) = weights.experts
    sizes = measure_sizes(path, 256, 64, 64, 1)
    assert experts.bytes == sizes.info.bytes_cycle and experts.n_in == 256 and not weights.random
    assert sum(p.bytes for p in weights.dense) <= sizes.info.bytes_dense
    assert Value(7, b"\1").scalar() is True


def test_the_last_expert_to_arrive_is_still_multiplied() -> None:
    c = fc.Compute(1.0, 2.0, "estimated")
    assert fc._token(c, 3.0, 4) == 1 + 3 + 0.5
    assert fc._token(c, 1.0, 4) == 1 + 2 and fc._token(c, 0.0, 4) == 3


def test_a_prompt_reads_what_is_not_there() -> None:
    sizes = model()
    small, large = (fc.forecast(sizes, WEIGHTS, machine(), b, "exact") for b in (sizes.smallest, sizes.largest))
    assert large.prompt_s == 0
    assert small.prompt_s == pytest.approx(sizes.info.bytes_high * (1 - small.share) / machine().bandwidth)


def test_reads_of_two_sizes_take_the_time_of_both() -> None:
    sizes = model(has_low=True)
    info = sizes.info
    sizes = replace(sizes, info=replace(info, bytes_expert_low=info.bytes_expert_high // 2))
    high, low = (DiskProbe(info.bytes_expert_high, dict.fromkeys(probe.DEPTHS, r), True, 0.0) for r in (8e8, 2e8))
    m = fc.Machine(high, low, fc.Compute(0.1, 0.1, "estimated"), 2)
    loads = Loads(0.1, 0.2, 0.0)  # as many bytes high as low
    assert fc._bandwidth(sizes, m, loads) == pytest.approx(1 / (0.5 / high.at(1.2) + 0.5 / low.at(1.2)), rel=0.01)


def test_the_command_has_no_less_memory_than_was_planned() -> None:
    assert "--memory 101MiB " in pl._command(Path("m"), (100 << 20) + 1, 512, (2048, 2048), 2, "hobbit")


@pytest.mark.parametrize(("faster", "mode"), [(1.05, "exact"), (1.2, "hobbit")])
def test_what_gains_little_is_not_worth_a_loss(monkeypatch: pytest.MonkeyPatch, faster: float, mode: str) -> None:
    def forecast(sizes: Any, weights: Any, machine: Any, budget: int, mode: str) -> Any:
        return types.SimpleNamespace(tok_s=faster if mode == "hobbit" else 1.0, loads=Loads(0.1, 0.1, 0.0))

    monkeypatch.setattr(pl, "forecast", forecast)
    sizes: Any = types.SimpleNamespace(largest=100, info=types.SimpleNamespace(has_low=True))
    assert pl._mode(sizes, None, None, 50)[0] == mode  # type: ignore[arg-type]
