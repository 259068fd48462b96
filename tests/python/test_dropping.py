"""Fewer experts: dropping on a miss, and fewer a token. Both work on files without low copies."""

from __future__ import annotations

import numpy as np
import pytest

from decode import load, logits, words
from hobbit_cpp import Llama, OffloadParams
from models import tiny, tiny_dual

quiet = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

POOL = "25%"


@quiet
@pytest.mark.parametrize("dual", [False, True])
def test_dropping_skips_on_misses_only_and_serves_nothing_low(dual: bool) -> None:
    path = tiny_dual("qwen3moe") if dual else tiny("qwen3moe")
    stock = load(Llama, str(path), 1)
    want = logits(stock, words(stock, 60), 1)
    read = []
    for fraction in (1e-3, 0.9):
        params = OffloadParams(precision_rule="drop", drop_fraction=fraction, prefetch_depth=0)
        llm = load(Llama, str(path), 1, offload=params, expert_cache=POOL)
        got = logits(llm, words(llm, 60), 1)
        stats = llm.offload_stats()
        assert stats.hits_low == stats.loads_low == 0 and stats.mass_low == 0.0
        assert stats.selections == stats.hits_high + stats.loads_high + stats.skips
        assert (stats.skips > 0) == (fraction == 0.9)
        assert np.array_equal(got, want) == (fraction < 0.5)
        read.append(stats.bytes_read)
        llm.close()
    assert read[1] < read[0]
    stock.close()
    # With every expert there nothing is missed, so nothing is dropped once it was read.
    params = OffloadParams(mode="lru", precision_rule="drop", drop_fraction=1e-3)
    llm = load(Llama, str(path), 1, offload=params, expert_cache="100%")
    assert np.array_equal(logits(llm, words(llm, 60), 1), want)
    llm.close()


@quiet
@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize("offload", ["lru", "hobbit"])
def test_fewer_experts_are_those_of_the_largest_weights(offload: str, chunk: int) -> None:
    path = tiny("mixtral")
    params = OffloadParams(mode=offload, exact=True, max_experts=1)
    llm = load(Llama, str(path), 1, offload=params, expert_cache=POOL)
    # A router that selects one expert gives it all of the weight.
    stock = load(Llama, str(path), 1, kv_overrides={"llama.expert_used_count": 1})
    every = load(Llama, str(path), 1)
    tokens = words(llm, 48)
    got, want = logits(llm, tokens, chunk), logits(stock, tokens, chunk)
    # Not bit for bit: scaling the one weight up to the sum of both rounds, and a near tie at a router may turn.
    assert np.median(np.abs(got - want)) < 0.01 * np.median(np.abs(logits(every, tokens, chunk) - want))
    stats = llm.offload_stats()
    assert stats.skips * 2 == stats.selections
    for model in (llm, stock, every):
        model.close()


@quiet
def test_as_many_experts_as_the_router_selects_is_exact() -> None:
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload=OffloadParams(exact=True, max_experts=2), expert_cache=POOL)
    stock = load(Llama, str(path), 1)
    tokens = words(llm, 20)
    assert np.array_equal(logits(llm, tokens, 1), logits(stock, tokens, 1))
    llm.close()
    stock.close()
