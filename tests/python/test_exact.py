"""Exact mode computes what stock llama.cpp computes, bit for bit, wherever the experts come from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Tuple

import numpy as np
import numpy.typing as npt
import pytest

from decode import load, logits, stock_logits, words
from hobbit_cpp import Llama, OffloadParams
from hobbit_cpp._session import Session
from models import tiny, tiny_dual
from tiny_models import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

N_PREFILL, N_DECODE = 100, 40
Array = npt.NDArray[np.float32]


@functools.cache
def stock(path: Path, threads: int) -> Tuple[Array, Array]:
    """Logits of stock llama.cpp: a prompt in batches of 64, and token by token."""
    llm = load(Llama, str(path), threads)
    prompt = words(llm, N_PREFILL)
    out = logits(llm, prompt, 64), logits(llm, prompt[:N_DECODE], 1)
    llm.close()
    return out


@functools.cache
def pool_sizes(path: Path) -> Tuple[int, ...]:
    info = Session(str(path), OffloadParams()).info
    one_layer = info.pool_min + (info.n_expert - info.n_expert_used) * info.slot_high
    return info.pool_min, one_layer, info.pool_max // 4, info.pool_max


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pool", range(4), ids=["floor", "one-layer", "quarter", "all"])
@pytest.mark.parametrize("expert_type", ["F16", "Q8_0"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_exact_is_stock(shape: str, expert_type: str, pool: int, threads: int) -> None:
    path = tiny(shape, expert_type)
    want_prefill, want_decode = stock(path, threads)
    size = max(pool_sizes(path)[pool], pool_sizes(path)[0])
    llm = load(Llama, str(path), threads, offload="hobbit", exact=True, expert_cache=size)
    prompt = words(llm, N_PREFILL)
    assert np.array_equal(want_prefill, logits(llm, prompt, 64))
    assert np.array_equal(want_decode, logits(llm, prompt[:N_DECODE], 1))
    stats = llm.offload_stats()
    assert stats.n_tokens == N_PREFILL + N_DECODE
    assert stats.loads_high > 0 and stats.loads_low == stats.skips == stats.hits_low == 0
    llm.close()


@pytest.mark.parametrize("high", ["Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4", "Q6_K", "Q5_0", "BF16"])
def test_every_kind_of_kernel(high: str) -> None:
    """Types that stock llama.cpp repacks on this CPU or not, tiles in batches or not, and plain floats."""
    path = tiny_dual("qwen3moe", high, "none")
    want_prefill, want_decode = stock(path, 2)
    llm = load(Llama, str(path), 2, offload="lru", expert_cache=pool_sizes(path)[2])
    prompt = words(llm, N_PREFILL)
    assert np.array_equal(want_prefill, logits(llm, prompt, 64))
    assert np.array_equal(want_decode, logits(llm, prompt[:N_DECODE], 1))
    llm.close()


@pytest.mark.parametrize("mode", ["lru", "hobbit"])
def test_a_file_with_one_precision_is_run_as_it_is(mode: str) -> None:
    """Without low copies there is nothing to serve instead, so nothing is skipped either."""
    path = tiny("mixtral", "Q8_0")
    llm = load(Llama, str(path), 2, offload=mode, expert_cache=pool_sizes(path)[2])
    assert np.array_equal(stock(path, 2)[0], logits(llm, words(llm, N_PREFILL), 64))
    llm.close()


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_dual_file_in_exact_mode_is_its_high_precision(shape: str) -> None:
    path = tiny_dual(shape)
    plain = load(Llama, str(path), 2)  # offload=None passes over the low copies
    prompt = words(plain, N_PREFILL)
    want = logits(plain, prompt, 64)
    plain.close()
    llm = load(Llama, str(path), 2, offload="hobbit", exact=True, expert_cache=pool_sizes(path)[2])
    assert np.array_equal(want, logits(llm, prompt, 64))
    llm.close()


@pytest.mark.no_asan
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_offload_none_is_unpatched(shape: str, tmp_path: Path) -> None:
    """The patches change nothing for whoever does not use them: libllama built without them gives the same logits."""
    path = tiny(shape, "Q8_0")
    llm = load(Llama, str(path), 2)
    prompt = words(llm, N_PREFILL)
    ours = logits(llm, prompt, 64)
    llm.close()
    assert np.array_equal(ours, stock_logits(path, prompt, 64, tmp_path))


@pytest.mark.parametrize("high", ["F16", "Q4_K"])
def test_streaming_serves_a_batch_that_does_not_fit(high: str, tmp_path: Path) -> None:
    """At the floor a batch wants more experts than there are slots; the others are streamed, each read once a product."""
    path = tiny_dual("mixtral", high, "none")
    llm = load(Llama, str(path), 2, offload="lru", expert_cache=pool_sizes(path)[0])
    prompt = words(llm, 64)
    got = logits(llm, prompt, 64)
    stats = llm.offload_stats()
    info = llm.offload_info
    assert stats.slots_high == info.n_expert_used < info.n_expert
    assert stats.bytes_demand <= 1.2 * info.bytes_high  # every expert once, and the padding of direct reads
    assert np.array_equal(got, stock(path, 2)[0][:64])
    llm.close()
