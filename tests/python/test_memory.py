"""The budget holds: a model larger than it is loaded, fed full batches, filled up to its context, always under the budget."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

import tiny_models
from cgroups import entering, memory_cgroup, oom_kills
from hobbit_cpp import _memory
from hobbit_cpp._memory import available, cgroup_limits, forget_peak, parse_size, peak_resident, resident, total
from models import tiny_wordy

BUDGET = 260 << 20

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama

def written():
    try:
        return int(open("/proc/self/io").read().partition("\\nwrite_bytes: ")[2].split()[0])
    except OSError:
        return 0

path, memory, offload = sys.argv[1], int(sys.argv[2]), sys.argv[3]
llm = Llama(path, offload=offload, memory=memory, n_ctx=512, n_batch=256, n_ubatch=256, n_threads=2, verbose=False)
prompt = (llm.tokenize(b"the expert of the layer and the token in the wood ") * 100)[:480]
llm.eval(prompt)                      # full batches
for token in prompt[:30]:             # up to the end of the context
    llm.eval([token])
llm.reset()
llm.eval(prompt[:100])                # another conversation
s = llm.offload_stats()
print(json.dumps({"peak": s.peak_memory, "budget": s.memory_budget, "pool": s.pool_bytes, "slots": s.slots_high,
                  "tokens": s.n_tokens, "read": s.bytes_read, "written": written()}))
llm.close()
"""


LONG = """
import json, sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama
sizes = {"n_ctx": 4096, "n_batch": 2048, "n_ubatch": 2048, "n_threads": 2, "flash_attn": sys.argv[3] == "True"}
llm = Llama(sys.argv[1], offload="lru", memory=int(sys.argv[2]), verbose=False, **sizes)
llm.eval((llm.tokenize(b"the expert of the layer and the token in the wood ") * 1000)[:4000])
s = llm.offload_stats()
print(json.dumps({"peak": s.peak_memory, "budget": s.memory_budget, "pool": s.pool_bytes, "tokens": s.n_tokens}))
"""


def run(model: Path, mode: str, cgroup: Optional[Path] = None) -> Dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(model), str(BUDGET), mode]
    done = subprocess.run(command, preexec_fn=entering(cgroup), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out: Dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.mark.parametrize("mode", ["hobbit", "lru"])
def test_the_process_stays_under_its_budget(large_model: Path, mode: str) -> None:
    assert large_model.stat().st_size > 1.4 * BUDGET
    out = run(large_model, mode)
    assert out["budget"] == BUDGET
    assert out["peak"] <= BUDGET, out
    # And it is used: the pool has what the rest leaves.
    assert out["pool"] > 0.25 * BUDGET, out
    assert out["tokens"] == 610 and out["read"] > out["pool"]
    assert out["written"] < 1 << 20, "only reads: no weights go to the disk"


WHOLE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama
path, memory, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
llm = Llama(path, offload="lru", memory=memory, n_ctx=512, flash_attn=True, verbose=False, n_threads=2, **{what: True})
text = "the expert of the layer and the token in the wood " * 40
for i in range(3):
    if what == "embedding":
        llm.create_embedding([text[:1700], text[:200], text[:50]])
    else:
        llm.create_completion(text[:1500], max_tokens=30, logprobs=5)
s = llm.offload_stats()
print(json.dumps({"peak": s.peak_memory, "pool": s.pool_bytes}))
"""


@pytest.mark.parametrize("what,budget", [("embedding", 440 << 20), ("logits_all", 580 << 20)])
def test_embeddings_and_logprobs_stay_under_the_budget(what: str, budget: int) -> None:
    """With a vocabulary of 50,000, whose logits are kept for each token."""
    command = [sys.executable, "-c", WHOLE, str(tiny_wordy()), str(budget), what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["peak"] <= budget, out


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_long_prompt_stays_under_the_budget(large_model: Path, flash_attn: bool) -> None:
    """What ggml works in (attention over the whole context, here 64 MiB) is part of it."""
    budget = 480 << 20
    command = [sys.executable, "-c", LONG, str(large_model), str(budget), str(flash_attn)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["budget"] == budget and out["tokens"] == 4000 and out["pool"] > 50 << 20, out
    assert out["peak"] <= budget, out


def test_in_a_memory_cgroup_nobody_is_killed(large_model: Path) -> None:
    """The limit is that of the budget: page cache of the model would count, and there is none."""
    with memory_cgroup(BUDGET) as cgroup:
        out = run(large_model, "hobbit", cgroup)
        assert out["peak"] <= BUDGET
        assert oom_kills(cgroup) == 0


def test_what_is_free_is_seen_through_cgroups() -> None:
    assert 0 < available() <= total() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < resident() <= peak_resident()
    with memory_cgroup(300 << 20) as cgroup:
        program = "from hobbit_cpp._memory import *; print(total(), available(), default_budget())"
        done = subprocess.run(
            [sys.executable, "-c", program], preexec_fn=entering(cgroup), capture_output=True, text=True, check=True
        )
        limit, free, default = map(int, done.stdout.split())
        assert limit == 300 << 20
        assert 200 << 20 < free < limit
        assert default < limit
    assert all(c.limit > c.used for c in cgroup_limits())


LARGE_BLOCK = """
import ctypes
from hobbit_cpp._memory import large_blocks_apart, resident
libc, size = ctypes.CDLL(None), 20 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def take():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block
large_blocks_apart()
libc.free(take())  # from then on glibc would take such blocks from its heap
block = take()
kept = libc.malloc(1000)  # above it in the heap, which cannot shrink
held = resident()
libc.free(block)
print((held - resident()) / size)
"""


def test_large_blocks_are_given_back_when_they_are_freed() -> None:
    """Or the second model of a process would be short of what the loading of the first has left in pieces."""
    done = subprocess.run([sys.executable, "-c", LARGE_BLOCK], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.95


def test_threads_of_one_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2", "3", "0,4", "1,5"]):
        (tmp_path / str(cpu)).write_text(siblings + "\n")
    monkeypatch.setattr(_memory, "_TOPOLOGY", str(tmp_path) + "/{}")
    for allowed, n in ((range(6), 4), ([0, 4], 1), ([0, 1, 5], 2), ([7, 8], 2), ([2, 9], 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: set(allowed))
        assert _memory.cores() == n
    monkeypatch.undo()
    assert 1 <= _memory.cores() <= len(_memory.processors())


def test_peaks_can_be_forgotten() -> None:
    # Not by malloc, which may have it already, and may keep it.
    with mmap.mmap(-1, 64 << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        before = peak_resident()
    forget_peak()
    assert resident() <= peak_resident() < before - (48 << 20)


def test_sizes_beyond_all_numbers() -> None:
    for size in (10**400, "1" * 400, "9" * 30, f"{10**12}T"):
        assert parse_size(size) == 1 << 60


GRAMMAR = """
import sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama
options = {"offload": "hobbit", "exact": True, "memory": int(sys.argv[2]), "n_ctx": 512, "n_threads": 2, "flash_attn": True}
llm = Llama(sys.argv[1], verbose=False, **options)
whole = llm.offload_stats().pool_bytes
for i in range(3):
    llm.create_chat_completion([{"role": "user", "content": "fox %d" % i}], max_tokens=4, response_format={"type": "json_object"})
lent = whole - llm.offload_stats().pool_bytes
llm.create_completion("the fox", max_tokens=2)
s = llm.offload_stats()
print(s.peak_memory, s.memory_budget, whole - s.pool_bytes, lent)
"""


AT_LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama, OffloadParams
from hobbit_cpp._memory import peak_resident
params = OffloadParams(exact=True, heat=True)
llm = Llama(sys.argv[1], offload=params, memory=sys.argv[2], n_ctx=256, n_batch=32, n_ubatch=32, n_threads=1, verbose=False)
llm.eval(llm.tokenize(b"the fox"))
print(peak_resident())
"""


def test_metadata_is_within_the_budget_while_it_is_read(tmp_path: Path) -> None:
    """A large vocabulary: in words, maps and copies several times what stands in the file."""
    model = tmp_path / "words.gguf"
    tiny_models.write_tiny(model, "mixtral", n_unused=400_000, n_embd=64)

    def load(memory: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", AT_LOAD, str(model), memory]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    refused = load("70MiB")
    said = re.search(r"needs at least ([\d.]+ MiB)", refused.stderr)
    assert said is not None, refused.stderr
    done = load(said.group(1).replace(" ", ""))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= parse_size(said.group(1).replace(" ", ""))


SMALL_GRAMMAR = """
import sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama, MemoryBudgetError
from hobbit_cpp._memory import peak_resident
options = {"offload": "hobbit", "exact": True, "n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 2, "flash_attn": True}
ask = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
budget, refused, served = int(sys.argv[2]), 0, 0
while served < 2:
    served = 0
    try:
        llm = Llama(sys.argv[1], memory=budget, verbose=False, **options)
    except MemoryBudgetError:
        pass
    else:
        for i in range(2):
            try:
                llm.create_chat_completion(response_format={"type": "json_object"}, **ask)
                served += 1
            except MemoryBudgetError as e:
                refused += "needs" in str(e)
                assert llm.create_chat_completion(**ask)["usage"]["completion_tokens"] > 0
        assert peak_resident() <= budget, (peak_resident(), budget)
        llm.close()
    budget += 4 << 20
print(refused, served)
"""


def test_a_grammar_that_the_budget_has_no_room_for_is_refused() -> None:
    command = [sys.executable, "-c", SMALL_GRAMMAR, str(tiny_wordy()), str(110 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    refused, served = map(int, done.stdout.split())
    assert refused > 2 and served == 2


def test_what_a_grammar_takes_is_lent_by_the_pool() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GRAMMAR, str(tiny_wordy()), str(BUDGET)], capture_output=True, text=True, timeout=300, check=True
    )
    peak, budget, missing, lent = map(int, done.stdout.split())
    assert peak <= budget == BUDGET
    assert abs(missing) <= 8 << 20  # it is whole again, but for what the heap keeps
    assert lent > 8 << 20
