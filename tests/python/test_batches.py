"""A prompt's buffers are borrowed from the expert pool, and the pool has them back."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

from hobbit_cpp import Llama, MemoryBudgetError, OffloadParams
from hobbit_cpp._batches import SMALL, BatchRoom
from hobbit_cpp._memory import resident
from hobbit_cpp.llama import llama_cpp

MIB = 1 << 20

# ---- the division ----


def taken(n: int) -> Tuple[int, int]:
    return n, n // 4


def room(spare: int = 1000, floor: int = 100, n_ubatch: int = 512) -> BatchRoom:
    return BatchRoom(n_ubatch, taken(n_ubatch), taken(SMALL), spare, floor, 10_000)


def layouts(made: BatchRoom, batches: List[int]) -> List[int]:
    """Those that a sequence of batches leads to."""
    out = []
    for n in batches:
        needed = made.to_lay_out(n)
        if needed is not None:
            made.laid_out(needed, taken(needed))
            out.append(needed)
    return out


def test_a_prompt_is_lent_what_it_needs_and_gives_it_back_after_a_few_tokens() -> None:
    made = room()
    assert made.pool == 1000 - 16 - 4
    assert layouts(made, [1, SMALL, 100]) == [128]
    assert made.pool == 1000 - 128 - 32
    assert layouts(made, [128, 90, 1, 1, 1]) == []
    assert layouts(made, [1]) == [SMALL]
    assert made.pool == 1000 - 16 - 32, "what ggml works in stays"


def test_batches_that_need_about_as_much_change_nothing() -> None:
    made = room()
    assert layouts(made, [50, 1, 20, 1, 1, 20, 1, 1, 1, 20]) == [64]


def test_drafts_after_a_long_prompt_keep_what_they_need() -> None:
    made = room()
    assert layouts(made, [512, 20, 1, 17, 70, 20, 1, 1, 70, 1, 1, 1]) == [512, 128]


def test_nothing_is_laid_out_for_more_than_the_largest_batch() -> None:
    assert layouts(room(n_ubatch=100), [5000, 5000]) == [100]


def test_batches_are_cut_where_the_pool_would_be_below_its_least() -> None:
    made = room(spare=500)
    assert made.largest(512) == 320 and made.largest(7) == 7  # 1.25 a token
    assert made.largest(512, withheld=300) == 64 and made.largest(512, withheld=450) == SMALL
    assert room(spare=105).largest(512) == SMALL and room(spare=105).largest(2) == 2
    assert room(n_ubatch=64).largest(512) == 512, "llama.cpp cuts them itself"


def test_a_pool_of_another_size_keeps_room_for_a_batch() -> None:
    made = room()
    made.laid_out(256, taken(256))
    assert made.pool == 1000 - 320
    assert made.resize(500, 90) == 500 + 16 + 64 - 1000
    assert made.pool == 500 - 240, "with what the batch at hand has"
    made.laid_out(SMALL, taken(SMALL))
    assert made.pool == 500
    made.resize(100, 90)
    assert made.pool == 100 and made.spare == 190 and made.largest(512) >= 64


# ---- what llama.cpp touches ----

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from hobbit_cpp import Llama
from hobbit_cpp._memory import resident
from hobbit_cpp.llama import _Llama
flash = sys.argv[4] == "True"
llm = Llama(sys.argv[1], offload="lru", memory=int(sys.argv[2]), n_ctx=2048, n_batch=int(sys.argv[3]), n_ubatch=int(sys.argv[3]),
            flash_attn=flash, n_threads=2, verbose=False)
prompt = (llm.tokenize(b"the expert of the layer and the token in the wood ") * 300)[:2000]
pools, held, batches = [], [], []
evaluate = _Llama.eval
def counted(self, tokens):
    batches.append(len(tokens))
    evaluate(self, tokens)
_Llama.eval = counted
def note():
    pools.append(llm.offload_stats().pool_bytes)
    held.append(resident())
note()
for _ in range(2):
    llm.eval(prompt[:1900])
    note()
    for token in prompt[:6]:
        llm.eval([token])
    note()
    llm.reset()
s = llm.offload_stats()
print(json.dumps({"pools": pools, "held": held, "peak": s.peak_memory, "budget": s.memory_budget, "batches": batches}))
"""


def run(model: Path, memory: int, n_ubatch: int, flash: bool) -> Dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(model), str(memory), str(n_ubatch), str(flash)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out: Dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return out


@pytest.mark.parametrize("flash", [True, False])
def test_the_pool_lends_and_the_budget_holds(large_model: Path, flash: bool) -> None:
    budget = 400 * MIB
    out = run(large_model, budget, 2048, flash)
    start, prompt, after, again, end = out["pools"]
    assert prompt < start - 20 * MIB and again == prompt, out
    # What ggml works in stays with it, and is little with flash attention.
    assert prompt + 20 * MIB < after <= start and end == after, out
    assert not flash or after > start - 8 * MIB, out
    assert out["peak"] <= budget and max(out["held"]) > 0.9 * budget, out
    assert [n for n in out["batches"] if n > 1] == [1900, 1900]


def test_a_prompt_is_cut_where_memory_is_short(large_model: Path) -> None:
    least = run(large_model, 400 * MIB, 512, True)
    budget = 400 * MIB - least["pools"][1] + 60 * MIB
    out = run(large_model, budget, 2048, True)
    longest = max(out["batches"])
    assert 512 <= longest < 1900 and sum(n for n in out["batches"] if n > 1) == 3800, out
    assert out["peak"] <= budget, out


def evaluated(llm: Any, batches: List[int]) -> List[np.ndarray[Any, Any]]:
    """The last logits of each batch."""
    out = []
    words = llm.tokenize(b"the expert of the layer and the token in the wood ") * 160
    for n in batches:
        llm.eval(words[llm.n_tokens : llm.n_tokens + n])
        out.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy())
    return out


@pytest.mark.parametrize(
    "n_batch,batches,as_commands",
    [
        (512, [300, 1, 1, 1, 1, 1, 70, 1, 500, 1, 1, 1, 1, 1], False),
        (2048, [1200, 1, 1, 1, 1, 1, 70, 1, 300, 1, 1, 1, 1, 1], True),
    ],
    ids=["as Llama has it", "as the commands have it"],
)
def test_logits_are_those_of_stock(large_model: Path, n_batch: int, batches: List[int], as_commands: bool) -> None:
    kwargs: Dict[str, Any] = {"n_ctx": 2048, "n_batch": n_batch, "n_ubatch": n_batch, "flash_attn": as_commands, "n_threads": 2}
    kwargs["verbose"] = False
    stock = Llama(str(large_model), **kwargs)
    want = evaluated(stock, batches)
    stock.close()
    params = OffloadParams(exact=True, embeddings_on_disk=as_commands or None)
    ours = Llama(str(large_model), offload=params, memory=resident() + 300 * MIB, **kwargs)
    assert ours._session is not None and ours._session._room is not None
    assert ours._session.embeddings_on_disk is as_commands
    pools = []
    for i, n in enumerate(batches):
        assert np.array_equal(want[i], evaluated(ours, [n])[0]), i
        pools.append(ours.offload_stats().pool_bytes)
    assert pools[0] < pools[5] > pools[8] < pools[13], pools
    ours.close()


def test_adapters_that_need_another_scheduler(large_model: Path) -> None:
    """llama.cpp puts off making it until something is computed, or laid out."""
    llm = Llama(str(large_model), offload="lru", memory=resident() + 250 * MIB, n_ctx=512, n_batch=256, verbose=False)
    assert llm._session is not None and llm._session._room is not None
    n_embd, n_layer = llm._model.n_embd(), llm.offload_info.n_layer
    plain = evaluated(llm, [5])[0]
    llm.reset()
    zeros = (ctypes.c_float * (n_embd * (n_layer - 1)))()
    assert llama_cpp.llama_set_adapter_cvec(llm._ctx.ctx, zeros, len(zeros), n_embd, 1, n_layer - 1) == 0
    evaluated(llm, [200])
    llm.reset()
    assert np.allclose(evaluated(llm, [5])[0], plain)
    llm.close()


def test_a_pool_with_a_size_of_its_own_lends_nothing(large_model: Path) -> None:
    lends = {"lru": OffloadParams(mode="lru"), "size": OffloadParams(expert_cache=150 * MIB), "fate": OffloadParams(mode="fate")}
    for name, offload in lends.items():
        llm = Llama(str(large_model), offload=offload, memory=resident() + 300 * MIB, n_ctx=512, verbose=False)
        before = llm.offload_stats().pool_bytes
        evaluated(llm, [200])
        assert (llm.offload_stats().pool_bytes != before) is (name == "lru"), name
        llm.close()


def test_a_resize_during_a_prompt_is_of_the_pool_after_it(large_model: Path) -> None:
    llm = Llama(
        str(large_model), offload="lru", memory=resident() + 300 * MIB, n_ctx=2048, n_batch=2048, n_ubatch=2048, flash_attn=True,
        verbose=False,
    )  # fmt: skip
    budget = llm.offload_stats().memory_budget
    start = llm.offload_stats().pool_bytes
    llm.eval((llm.tokenize(b"the expert of the layer ") * 400)[:1500])
    lent = start - llm.offload_stats().pool_bytes
    assert lent > 20 * MIB
    llm.resize_expert_cache(start - 40 * MIB)
    s = llm.offload_stats()
    slot = llm.offload_info.slot_high
    assert abs(s.pool_bytes - (start - 40 * MIB - lent)) < 8 * MIB and abs(budget - s.memory_budget - 40 * MIB) < 8 * MIB
    for _ in range(5):
        llm.eval([5])
    assert abs(llm.offload_stats().pool_bytes - (start - 40 * MIB)) <= 2 * slot
    with pytest.raises(MemoryBudgetError):
        llm.resize_expert_cache(llm.offload_info.pool_min - 1)
    llm.close()


def test_a_resize_while_a_prompt_begins_is_not_undone(large_model: Path) -> None:
    llm = Llama(str(large_model), offload="lru", memory=resident() + 300 * MIB, n_ctx=512, verbose=False)
    start, slot = llm.offload_stats().pool_bytes, llm.offload_info.slot_high
    session: Any = llm._session
    lock, resizes = session._resizing, [start - 60 * MIB]

    class Late:
        """Lets another call have the lock first."""

        def __enter__(self) -> None:
            if resizes:
                llm.resize_expert_cache(resizes.pop())
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    session._resizing = Late()
    evaluated(llm, [200])
    assert not resizes
    for _ in range(5):
        llm.eval([5])
    assert abs(llm.offload_stats().pool_bytes - (start - 60 * MIB)) <= 2 * slot
    llm.close()
