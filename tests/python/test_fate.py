"""`Llama(offload="fate")`, and the eviction rules that split the cache among the layers, on tiny models."""

from __future__ import annotations

from typing import Any, Dict

import numpy as np
import pytest

from decode import load, logits, words
from hobbit_cpp import Llama, OffloadParams
from hobbit_cpp._session import Session
from models import tiny_dual
from tiny_models import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")


def half(path: Any) -> int:
    info = Session(str(path), OffloadParams()).info
    return max(info.pool_max // 2, info.pool_min)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_on_demand_low_ahead_high(shape: str) -> None:
    path = tiny_dual(shape)
    llm = load(Llama, str(path), 1, offload="fate", expert_cache=half(path))
    tokens = words(llm, 80)
    got = logits(llm, tokens, 1)
    s = llm.offload_stats()
    assert s.selections == s.hits_high + s.hits_low + s.loads_high + s.loads_low + s.skips
    assert s.loads_high == s.skips == 0  # one token at a time nothing is read on demand in high precision
    assert s.loads_low > 0 and s.prefetches > 0 and s.hits_high > 0
    exact = load(Llama, str(path), 1)
    want = logits(exact, tokens, 1)
    agree = (got.argmax(-1) == want.argmax(-1)).mean()
    assert np.isfinite(got).all() and agree > 0.5, agree
    llm.close()
    exact.close()


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_of_a_prompt_only_unpopular_experts_are_low(shape: str) -> None:
    path = tiny_dual(shape)
    llm = load(Llama, str(path), 1, offload=OffloadParams(mode="fate", prefetch_depth=0), expert_cache=half(path))
    logits(llm, words(llm, 64), 64)
    for layer in llm.offload_stats().layers:
        assert 0 <= layer.hits_low + layer.loads_low <= 0.25 * layer.selections
        assert layer.loads_high > 0 and layer.skips == 0
    assert llm.offload_stats().loads_low > 0
    llm.close()


def test_hobbit_takes_unpopular_experts_of_a_prompt_in_low_precision_when_it_is_told_to() -> None:
    path = tiny_dual("mixtral")
    low = {}
    for share in (0.0, 0.3):
        # Thresholds that leave everything high: what is low is low by popularity.
        params = OffloadParams(prefetch_depth=0, prefill_low=share, t1=1.0, t2=1.0)
        llm = load(Llama, str(path), 1, offload=params, expert_cache=half(path))
        tokens = words(llm, 72)
        logits(llm, tokens[:64], 64)
        s = llm.offload_stats()
        low[share] = s.hits_low + s.loads_low
        assert s.skips == 0 and low[share] <= share * s.selections
        llm.reset_offload_stats()
        logits(llm, tokens[64:], 1)
        assert llm.offload_stats().loads_low == 0, "single tokens are not concerned"
        llm.close()
    assert low[0.0] == 0 < low[0.3]


@pytest.mark.parametrize("shape", ["mixtral", "qwen3moe"])
def test_what_a_prompt_reads_ahead_is_low_for_unpopular_experts_too(shape: str) -> None:
    path = tiny_dual(shape)
    read = {}
    for share in (0.0, 0.6):
        params = OffloadParams(prefill_low=share, t1=1.0, t2=1.0)
        llm = load(Llama, str(path), 1, offload=params, expert_cache=half(path))
        for _ in range(3):
            logits(llm, words(llm, 64), 64)
        read[share] = llm.offload_stats().bytes_read
        llm.close()
    # Low copies have half the bytes, and are more of the experts than of the selections. Read ahead high, it was .68 and .75.
    assert read[0.6] < 0.6 * read[0.0], read


@pytest.mark.parametrize("eviction", ["fate", "layer-arc", "layer-lru"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_exact_stays_exact(shape: str, eviction: str) -> None:
    path = tiny_dual(shape)
    stock = load(Llama, str(path), 1)
    tokens = words(stock, 60)
    mode: Dict[str, Any] = {"mode": "fate"} if eviction == "fate" else {"eviction": eviction}
    pool = Session(str(path), OffloadParams()).info.pool_min
    for size in (pool, half(path)):
        llm = load(Llama, str(path), 1, offload=OffloadParams(exact=True, **mode), expert_cache=size)
        for chunk in (1, 32):
            assert np.array_equal(logits(llm, tokens, chunk), logits(stock, tokens, chunk))
        llm.close()
    stock.close()
