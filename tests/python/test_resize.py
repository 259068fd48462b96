"""The expert pool gets another size while a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hobbit_cpp import Llama, MemoryBudgetError, OffloadParams, ParameterError, StateError, UnsupportedModelError
from models import tiny, tiny_dense, tiny_dual

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama, MemoryBudgetError
from hobbit_cpp._memory import resident
MIB = 1 << 20
llm = Llama(sys.argv[1], offload="hobbit", exact=True, expert_cache=200 * MIB, n_ctx=128, n_threads=1, seed=1, verbose=False)
texts, held, pools, budgets = [], [], [], []
def note():
    texts.append(llm.create_completion("the expert of the layer", max_tokens=8, temperature=0)["choices"][0]["text"])
    held.append(resident())
    s = llm.offload_stats()
    pools.append(s.pool_bytes)
    budgets.append(s.memory_budget)
note()
end = time.monotonic() + 10
while True:  # what is being read keeps its slot until the next token, or until it is asked for again
    llm.resize_expert_cache(60 * MIB)
    idle = resident()
    if held[0] - idle > 120 * MIB or time.monotonic() > end:
        break
    time.sleep(0.01)
note()
llm.resize_expert_cache("180MiB")
note()
try:
    llm.resize_expert_cache(llm.offload_info.pool_min - 1)
    refused = False
except MemoryBudgetError:
    refused = True
note()
llm.resize_expert_cache("100%")
largest = llm.offload_stats().pool_bytes == llm.offload_info.pool_max
llm.close()
print(json.dumps({"texts": texts, "held": held, "pools": pools, "budgets": budgets, "idle": idle, "refused": refused,
                  "largest": largest}))
"""


def test_memory_follows_and_exact_text_stays(large_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(large_model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    mib = 1 << 20
    assert len(set(out["texts"])) == 1
    full, small, grown, _ = out["held"]
    assert full - out["idle"] > 120 * mib and full - small > 120 * mib, out
    assert grown - small > 90 * mib, out
    assert [round(p / mib / 10) * 10 for p in out["pools"]] == [200, 60, 180, 180]
    assert out["refused"] and out["pools"][2] == out["pools"][3] and out["budgets"][2] == out["budgets"][3]
    for i in (1, 2):
        assert out["budgets"][i] - out["budgets"][i - 1] == out["pools"][i] - out["pools"][i - 1]
    assert out["largest"]


def test_what_cannot_be_is_refused() -> None:
    llm = Llama(str(tiny("mixtral")), offload="hobbit", expert_cache="50%", n_ctx=64, verbose=False)
    before = llm.offload_stats()
    for size, error in (("50 apples", ParameterError), (1, MemoryBudgetError)):
        with pytest.raises(error):
            llm.resize_expert_cache(size)
    after = llm.offload_stats()
    assert (after.pool_bytes, after.memory_budget) == (before.pool_bytes, before.memory_budget)
    llm.close()
    with pytest.raises(StateError):
        llm.resize_expert_cache("50%")
    with pytest.raises(StateError):
        Llama(str(tiny_dense()), n_ctx=64, verbose=False).resize_expert_cache("50%")
    split = OffloadParams(eviction="layer-lru", expert_cache="50%")
    with pytest.raises(UnsupportedModelError):
        Llama(str(tiny("mixtral")), offload=split, n_ctx=64, verbose=False).resize_expert_cache("40%")


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama(str(tiny("mixtral")), offload="hobbit", expert_cache="50%", n_ctx=64, verbose=False)
    monkeypatch.setattr("hobbit_cpp._memory.available", lambda: 1000)
    llm.resize_expert_cache("40%")
    before = llm.offload_stats().pool_bytes
    with pytest.raises(MemoryBudgetError, match="are free"):
        llm.resize_expert_cache("90%")
    assert llm.offload_stats().pool_bytes == before
    llm.close()


def test_whoever_cancels_does_not_wait_for_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that grows by gigabytes takes seconds, and to close the model waits for it."""
    llm = Llama(str(tiny("mixtral")), offload="hobbit", expert_cache="50%", n_ctx=64, verbose=False)
    under_way, go_on = threading.Event(), threading.Event()
    session = llm._session
    assert session is not None
    resize = session._resize

    def slow(pool: int) -> None:
        under_way.set()
        assert go_on.wait(60)
        resize(pool)

    monkeypatch.setattr(session, "_resize", slow)
    threads = [threading.Thread(target=work) for work in (lambda: llm.resize_expert_cache("80%"), llm.cancel, llm.close)]
    threads[0].start()
    assert under_way.wait(60)
    threads[1].start()
    threads[1].join(60)
    waited = threads[1].is_alive()
    threads[2].start()
    threads[2].join(0.2)
    closed = not threads[2].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not waited and not closed


@pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
def test_the_smallest_pool_is_no_larger_than_it_says() -> None:
    """Low copies had slots, and there is no room for them beside the high ones any more."""
    llm = Llama(str(tiny_dual("mixtral")), offload="hobbit", expert_cache="60%", n_ctx=64, n_threads=1, verbose=False)
    info = llm.offload_info
    llm.create_completion("the expert", max_tokens=4)
    assert llm.offload_stats().slots_low > 0
    llm.resize_expert_cache(info.pool_min)
    llm.create_completion("the expert", max_tokens=4)
    stats = llm.offload_stats()
    assert stats.slots_high * info.slot_high + stats.slots_low * info.slot_low <= stats.pool_bytes <= info.pool_min + 4096
    llm.close()
