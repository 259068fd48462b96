"""The expert pool gives memory back while memory is short: the decision over made-up readings, and a cgroup with two in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

from cgroups import entering, memory_cgroup, oom_kills
from hobbit_cpp import Llama, OffloadParams
from hobbit_cpp import _pressure as pressure
from hobbit_cpp._pressure import CALM_SECONDS, GROW_SECONDS, Monitor, Reading, Yielding
from models import tiny

GIB = 1 << 30
CALM = {"": Reading(8 * GIB, 16 * GIB)}
SHORT = {"": Reading(GIB // 2, 16 * GIB)}


def sizes(yielding: Yielding, readings: Dict[str, Reading], pool: int, seconds: int, begin: int = 0) -> List[int]:
    """Looks once a second; the pool after each."""
    out = []
    for i in range(seconds):
        pool = yielding.look(readings, pool, 4 * GIB, begin + i)
        out.append(pool)
    return out


def test_it_shrinks_by_eighths_to_the_floor_and_grows_again_when_calm() -> None:
    y = Yielding(CALM, 0, GIB)
    assert set(sizes(y, CALM, 4 * GIB, 100)) == {4 * GIB}
    down = sizes(y, SHORT, 4 * GIB, 10)
    assert down == [4 * GIB - i * GIB // 2 for i in range(1, 7)] + [GIB] * 4
    up = sizes(y, CALM, GIB, 60, begin=10)
    assert up[int(CALM_SECONDS) - 1] == GIB and up[int(CALM_SECONDS)] == 3 * GIB // 2
    assert up[int(CALM_SECONDS + GROW_SECONDS) - 1] == 3 * GIB // 2 and up[int(CALM_SECONDS + GROW_SECONDS)] == 2 * GIB
    assert up[-1] == 4 * GIB
    # and it is not calm as soon as it is not short
    between = {"": Reading(5 * GIB // 4, 16 * GIB)}
    assert set(sizes(y, between, GIB, 100)) == {GIB}


def test_shortage_in_between_starts_the_wait_anew() -> None:
    y = Yielding(CALM, 0, GIB)
    sizes(y, SHORT, 4 * GIB, 3)
    assert sizes(y, CALM, 2 * GIB, 15)[-1] == 2 * GIB
    assert y.look(SHORT, 2 * GIB, 4 * GIB, 15) == 3 * GIB // 2
    assert set(sizes(y, CALM, 2 * GIB, int(CALM_SECONDS), begin=16)) == {2 * GIB}


def test_a_pool_below_the_floor_stays() -> None:
    assert Yielding(CALM, 0, 8 * GIB).look(SHORT, 4 * GIB, 4 * GIB, 0) == 4 * GIB


def test_any_domain_that_is_short_counts() -> None:
    y = Yielding({**CALM, "/a": Reading(2 * GIB, 4 * GIB)}, 0, GIB)
    assert y.look({**CALM, "/a": Reading(GIB // 8, 4 * GIB)}, 4 * GIB, 4 * GIB, 0) < 4 * GIB
    assert y.look({**CALM, "/new": Reading(0, 4 * GIB)}, 4 * GIB, 4 * GIB, 0) < 4 * GIB
    assert y.look({}, 4 * GIB, 4 * GIB, 0) == 4 * GIB


def test_stalls_count_where_memory_is_scarce() -> None:
    """Those of somebody else's small cgroup are in the figure of the machine."""
    y = Yielding(CALM, 0, GIB)
    assert y.look({"": Reading(8 * GIB, 16 * GIB, 60.0)}, 4 * GIB, 4 * GIB, 0) == 4 * GIB
    assert y.look({"": Reading(2 * GIB, 16 * GIB, 60.0)}, 4 * GIB, 4 * GIB, 0) == 7 * GIB // 2
    assert y.look({"": Reading(2 * GIB, 16 * GIB, 2.0)}, 4 * GIB, 4 * GIB, 0) == 4 * GIB


def test_a_budget_that_was_fitted_closely_is_not_short() -> None:
    mib = 1 << 20
    begin = {"/a": Reading(60 * mib, 1000 * mib)}  # 5 % would be 50 MiB; 36 of the 60 are still to come
    y = Yielding(begin, 36 * mib, 100 * mib)
    assert y.look({"/a": Reading(24 * mib, 1000 * mib)}, 800 * mib, 800 * mib, 0) == 800 * mib
    assert y.look({"/a": Reading(10 * mib, 1000 * mib)}, 800 * mib, 800 * mib, 0) == 700 * mib


def test_what_the_system_says_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psi = tmp_path / "memory"
    psi.write_text("some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n")
    assert pressure._stalled(psi) == 12.5
    assert pressure._stalled(tmp_path / "absent") == 0.0
    psi.write_text("nonsense")
    assert pressure._stalled(psi) == 0.0
    for name, r in pressure.read_all().items():
        assert 0 <= r.free <= r.total and r.stalled >= 0, name


def test_the_thread_shrinks_the_pool_and_ends_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_LOOK_SECONDS", 0.01)
    readings: Dict[str, Any] = dict(CALM)
    monkeypatch.setattr("hobbit_cpp._budget.read_all", lambda: dict(CALM))
    monkeypatch.setattr(Monitor.__init__, "__defaults__", (lambda: dict(readings),))
    llm = Llama(str(tiny("mixtral")), offload="hobbit", exact=True, expert_cache="100%", n_ctx=64, verbose=False)
    session = llm._session
    assert session is not None and session._monitor is not None
    whole = llm.offload_stats().pool_bytes
    readings.update(SHORT)
    end = time.monotonic() + 30
    while llm.offload_stats().pool_shrinks == 0:
        assert time.monotonic() < end
        llm.reset()
        llm.eval([1])
    s = llm.offload_stats()
    assert s.pool_bytes < whole and s.pool_grows == 0
    monkeypatch.setattr(pressure, "CALM_SECONDS", 0.05)
    monkeypatch.setattr(pressure, "GROW_SECONDS", 0.02)
    readings.update(CALM)
    while llm.offload_stats().pool_bytes < whole:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert llm.offload_stats().pool_grows > 0
    thread = session._monitor._thread
    llm.close()
    assert not thread.is_alive()


def test_it_can_be_switched_off() -> None:
    llm = Llama(str(tiny("mixtral")), offload=OffloadParams(yield_memory=False), n_ctx=64, verbose=False)
    assert llm._session is not None and llm._session._monitor is None
    llm.close()


PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama
llm = Llama(sys.argv[1], offload="hobbit", exact=True, memory=330 << 20, n_ctx=128, n_threads=1, verbose=False)
tokens = llm.tokenize(b"the expert of the layer and the token in the wood ") * 2
def go():
    llm.reset()
    llm.eval(tokens)
    s = llm.offload_stats()
    print(json.dumps({"pool": s.pool_bytes, "shrinks": s.pool_shrinks, "logit": llm._ctx.get_logits()[0]}), flush=True)
go()
while sys.stdin.readline():
    go()
llm.close()
"""
TAKER = """
import sys, time
held = []
for _ in range(110):  # 10 MiB/s for 11 s
    held.append(b"x" * (1 << 20))
    time.sleep(0.1)
print("held", flush=True)
sys.stdin.readline()
"""


def test_another_process_in_the_cgroup_takes_memory_and_nobody_is_killed(large_model: Path) -> None:
    with memory_cgroup(400 << 20) as cgroup:
        options: Dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        us = subprocess.Popen([sys.executable, "-c", PROGRAM, str(large_model)], preexec_fn=entering(cgroup), **options)
        assert us.stdin is not None and us.stdout is not None
        first = json.loads(us.stdout.readline())
        assert first["shrinks"] == 0
        other = subprocess.Popen([sys.executable, "-c", TAKER], preexec_fn=entering(cgroup), **options)
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        us.stdin.write("again\n")
        us.stdin.flush()
        then = json.loads(us.stdout.readline())
        assert then["shrinks"] > 0 and then["pool"] < first["pool"] - (20 << 20), (first, then)
        assert then["logit"] == first["logit"]
        for process in (other, us):
            process.communicate()
            assert process.returncode == 0
        assert oom_kills(cgroup) == 0


def test_a_pool_does_not_grow_while_tasks_wait() -> None:
    y = Yielding(CALM, 0, GIB)
    sizes(y, SHORT, 4 * GIB, 3)
    uneasy = {"": Reading(8 * GIB, 16 * GIB, 7.0)}
    assert set(sizes(y, uneasy, 2 * GIB, 100, begin=3)) == {2 * GIB}


def test_the_reserve_is_four_mib_at_least() -> None:
    mib = 1 << 20
    y = Yielding({"/a": Reading(10 * mib, 1000 * mib)}, 8 * mib, 100 * mib)
    assert y.look({"/a": Reading(3 * mib, 1000 * mib)}, 800 * mib, 800 * mib, 0) == 700 * mib
