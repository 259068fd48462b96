"""A prompt's buffers are borrowed from the expert pool, and the pool has them back."""

from __future__ import annotations

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
from models import tiny, tiny_dual

MIB = 1 << 20

# ---- the division ----


def taken(n: int) -> Tuple[int, int]:
    return n, n // 4


def room(spare: int = 1000, least: int = 100, n_ubatch: int = 512) -> BatchRoom:
    return BatchRoom(n_ubatch, taken(n_ubatch), taken(SMALL), spare, least)


def test_a_prompt_is_lent_what_it_needs_and_gives_it_back_after_a_few_tokens() -> None:
    made = room()
    assert made.pool == 1000 - 16 - 4 and made.borrowed == 0
    assert made.to_lay_out(1) is None and made.to_lay_out(SMALL) is None
    assert made.to_lay_out(100) == 128  # and not again for prompts that are hardly longer
    made.laid_out(128, taken(128))
    assert made.pool == 1000 - 128 - 32 and made.lent == 160 and made.borrowed == 112
    assert [made.to_lay_out(n) for n in (128, 40, 1, 1, 1)] == [None] * 5
    assert made.to_lay_out(1) == SMALL
    made.laid_out(SMALL, taken(SMALL))
    assert made.pool == 1000 - 16 - 32, "what ggml works in stays"
    assert made.borrowed == 0


def test_small_and_larger_batches_in_turn_change_nothing() -> None:
    made = room()
    made.laid_out(64, taken(64))
    assert [made.to_lay_out(n) for n in (1, 20, 1, 1, 20, 1, 1, 1, 20)] == [None] * 9


def test_nothing_is_laid_out_for_more_than_the_largest_batch() -> None:
    made = room(n_ubatch=100)
    assert made.to_lay_out(5000) == 100
    made.laid_out(100, taken(100))
    assert made.to_lay_out(5000) is None


def test_batches_are_cut_where_the_pool_would_be_below_its_least() -> None:
    made = room(spare=500, least=100)
    assert made.largest(512) == 320 and made.largest(7) == 7  # 1.25 a token
    tight = room(spare=105, least=100)
    assert tight.largest(512) == SMALL and tight.largest(2) == 2


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
    words = llm.tokenize(b"the expert of the layer and the token in the wood ") * 40
    for n in batches:
        llm.eval(words[llm.n_tokens : llm.n_tokens + n])
        out.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy())
    return out


@pytest.mark.parametrize("shape", ["mixtral", "qwen3moe", "deepseek2"])
def test_logits_are_those_of_stock(shape: str) -> None:
    batches = [100, 1, 1, 1, 1, 1, 70, 1, 200, 1, 1, 1, 1, 1]
    kwargs: Dict[str, Any] = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 256, "n_threads": 2, "verbose": False}
    stock = Llama(str(tiny(shape)), **kwargs)
    ours = Llama(str(tiny(shape)), offload="hobbit", exact=True, memory=resident() + 60 * MIB, **kwargs)
    for i, (a, b) in enumerate(zip(evaluated(stock, batches), evaluated(ours, batches))):
        assert np.array_equal(a, b), i
    stock.close()
    ours.close()


def test_a_pool_with_a_size_of_its_own_lends_nothing() -> None:
    for offload in (OffloadParams(expert_cache="50%"), OffloadParams(mode="fate")):
        llm = Llama(str(tiny_dual("mixtral")), offload=offload, memory=resident() + 80 * MIB, n_ctx=512, verbose=False)
        before = llm.offload_stats().pool_bytes
        evaluated(llm, [200])
        assert llm.offload_stats().pool_bytes == before
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
    assert abs(llm.offload_stats().pool_bytes - (start - 40 * MIB)) <= slot
    with pytest.raises(MemoryBudgetError):
        llm.resize_expert_cache(llm.offload_info.pool_min - 1)
    llm.close()
