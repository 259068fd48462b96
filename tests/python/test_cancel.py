"""Calls on one model: cancelled by another thread, one at a time, and what the object is afterwards."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest

from decode import TEXT, load, logits, words
from hobbit_cpp import EvaluationCancelled, Llama, OffloadParams, ReadError, StateError
from hobbit_cpp._session import Session
from hobbit_cpp.llama import llama_cpp
from models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

OFFLOADS = [None, "lru", "hobbit"]
LONG = 6000


def small_pool(offload: Any) -> Any:
    if offload is None:
        return {}
    return {"offload": offload, "exact": True, "expert_cache": Session(str(tiny("mixtral")), OffloadParams()).info.pool_min}


def long_context(offload: Any, **kwargs: Any) -> Llama:
    kwargs = {"n_threads_batch": 1, "n_batch": 8192, "n_ubatch": 64, **kwargs}
    return Llama(str(tiny("mixtral")), n_ctx=8192, verbose=False, n_threads=1, **kwargs, **small_pool(offload))


def in_thread(what: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(what)


@pytest.mark.parametrize("offload", ["lru", "hobbit"])
def test_a_running_llama_decode_stops_and_the_object_is_usable(offload: str) -> None:
    llm = long_context(offload)
    tokens = words(llm, LONG)
    llm.eval(tokens[:100])
    before = llm.offload_stats().n_tokens
    running = in_thread(lambda: llm.eval(tokens[100:]))
    while llm.offload_stats().n_tokens < before + 256 and not running.done():
        time.sleep(0.001)
    llm.cancel()
    with pytest.raises(EvaluationCancelled):
        running.result(60)
    # One llama_decode of all the tokens: it stopped within.
    assert llm.offload_stats().n_tokens < before + len(tokens) - 100
    assert llm.n_tokens == 100 and list(llm._input_ids) == tokens[:100]
    # What follows is as if nothing had been.
    fresh = long_context(offload)
    for model in (llm, fresh):
        model.eval(tokens[100:150])
    fresh.reset()
    fresh.eval(tokens[:100])
    fresh.eval(tokens[100:150])
    assert np.array_equal(last_logits(llm), last_logits(fresh))
    llm.close()
    fresh.close()


def last_logits(llm: Any) -> Any:
    return np.array(llm._ctx.get_logits()[: llm.n_vocab()])


@pytest.mark.parametrize("offload", OFFLOADS)
def test_cancel_takes_effect_between_batches_at_the_latest(offload: Any) -> None:
    llm = long_context(offload, n_batch=64)
    running = in_thread(lambda: llm.eval(words(llm, LONG)))
    while llm.n_tokens < 128 and not running.done():
        time.sleep(0.001)
    llm.cancel()
    with pytest.raises(EvaluationCancelled):
        running.result(60)
    n = llm.n_tokens
    assert n % 64 == 0 and 128 <= n < LONG
    llm.eval(words(llm, n + 10)[n:])
    assert llm.n_tokens == n + 10
    llm.close()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_cancel_of_nothing_does_nothing(offload: Any) -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, **small_pool(offload))
    tokens = words(llm, 30)
    want = logits(llm, tokens, 10)
    for _ in range(3):
        llm.cancel()
        assert np.array_equal(want, logits(llm, tokens, 10))
    # A call that was cancelled when it had computed all: the next one does not feel it.
    llm.create_completion(TEXT.decode(), max_tokens=1, stopping_criteria=cancelling(llm))
    assert np.array_equal(want, logits(llm, tokens, 10))
    llm.close()
    llm.cancel()


def cancelling(llm: Llama, after: int = 0) -> Any:
    seen: List[int] = []

    def stop(input_ids: Any, scores: Any) -> bool:
        seen.append(1)
        if len(seen) > after:
            llm.cancel()
        return False

    import llama_cpp

    return llama_cpp.StoppingCriteriaList([stop])


@pytest.mark.parametrize("offload", OFFLOADS)
def test_cancel_between_two_tokens_ends_the_completion(offload: Any) -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, **small_pool(offload))
    prompt = words(llm, 20)
    with pytest.raises(EvaluationCancelled):
        llm.create_completion(prompt, max_tokens=50, temperature=0, stopping_criteria=cancelling(llm, 5))
    assert 20 < llm.n_tokens < 30
    with pytest.raises(EvaluationCancelled):
        for i, _ in enumerate(llm.generate(prompt, temp=0)):
            if i == 3:
                llm.cancel()  # between two tokens of a stream
    # The whole prompt is in the context, and no valid logits: they are made anew.
    want = load(Llama, str(tiny("mixtral")), 1)
    again = [t for t, _ in zip(llm.generate(prompt, temp=0), range(8))]
    assert again == [t for t, _ in zip(want.generate(prompt, temp=0), range(8))]
    llm.close()
    want.close()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_embedding_is_cancelled(offload: Any) -> None:
    llm = long_context(offload, n_batch=128, embedding=True)
    text = TEXT.decode() * 3
    want = llm.embed(text)
    running = in_thread(lambda: llm.embed([text] * 300))
    time.sleep(0.2)
    llm.cancel()
    with pytest.raises(EvaluationCancelled):
        running.result(60)
    assert llm.embed(text) == want
    llm.close()


@pytest.mark.parametrize("offload", [None, "hobbit"])
def test_several_threads_take_turns(offload: Any) -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, **small_pool(offload))
    prompts = [words(llm, 60)[i : i + 20] for i in range(6)]
    want = [text(llm.create_completion(p, max_tokens=12, temperature=0)) for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda p: text(llm.create_completion(p, max_tokens=12, temperature=0)), prompts))
    assert got == want
    llm.close()


def text(completion: Any) -> str:
    out: str = completion["choices"][0]["text"]
    return out


@pytest.mark.parametrize("offload", [None, "hobbit"])
def test_a_stream_is_over_when_another_call_has_begun(offload: Any) -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, **small_pool(offload))
    stream: Any = llm.create_completion(words(llm, 20), max_tokens=50, stream=True)
    next(stream)
    llm.save_state()  # changes nothing
    next(stream)
    in_thread(lambda: llm.create_completion(words(llm, 30), max_tokens=3)).result(60)
    with pytest.raises(StateError, match="another call"):
        next(stream)
    # A stream that was closed or dropped is in nobody's way.
    stream = llm.create_completion(words(llm, 20), max_tokens=50, stream=True)
    next(stream)
    stream.close()
    llm.cancel()
    assert len(text(llm.create_completion(words(llm, 20), max_tokens=5))) > 0
    llm.close()


def test_after_a_failed_read_the_context_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny("mixtral", "Q8_0"), path)
    whole = path.read_bytes()
    llm = load(Llama, str(path), 1, offload="lru", expert_cache=Session(str(path), OffloadParams()).info.pool_min)
    tokens = words(llm, 60)
    llm.reset()
    for i in range(0, 60, 20):
        llm.eval(tokens[i : i + 20])
    want = llm.scores[:60].copy()
    llm.reset()
    llm.eval(tokens[:20])
    os.truncate(path, len(whole) - 4_000_000)
    with pytest.raises(ReadError):
        for _ in range(20):
            llm.eval(tokens[20:40])
            llm.n_tokens = 20
    assert llm.n_tokens == 20
    path.write_bytes(whole)
    for i in (20, 40):
        llm.eval(tokens[i : i + 20])
    assert np.array_equal(want, llm.scores[:60])
    # A state that cannot be cut back is given up.
    llm._is_recurrent = True
    os.truncate(path, len(whole) - 4_000_000)
    with pytest.raises(ReadError):
        for _ in range(20):
            llm.eval(tokens[:5])
    assert llm.n_tokens == 0
    path.write_bytes(whole)
    llm._is_recurrent = False
    for i in range(0, 60, 20):
        llm.eval(tokens[i : i + 20])
    assert np.array_equal(want, llm.scores[:60])
    llm.close()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_close_cancels_what_runs_in_another_thread(offload: Any) -> None:
    llm = long_context(offload, n_batch=64)
    tokens = words(llm, LONG)
    running = in_thread(lambda: llm.eval(tokens))
    while llm.n_tokens < 128:
        time.sleep(0.001)
    llm.close()
    with pytest.raises(EvaluationCancelled):
        running.result(60)
    for call in (lambda: llm.eval(tokens[:5]), lambda: llm.create_completion(tokens[:5]), llm.save_state, llm.reset):
        with pytest.raises(StateError, match="closed"):
            call()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_close_from_inside_of_a_call_frees_at_its_end(offload: Any) -> None:
    """As a signal handler does."""
    llm = long_context(offload)
    scores_seen = []

    def closes(ids: Any, scores: Any) -> Any:
        scores_seen.append(scores.copy())
        llm.close()
        return scores

    with pytest.raises((EvaluationCancelled, StateError)):
        llm.create_completion("the lazy", max_tokens=5, logits_processor=llama_cpp.LogitsProcessorList([closes]))
    assert len(scores_seen) == 1
    with pytest.raises(StateError, match="closed"):
        llm.eval([1])
    llm.close()


def test_close_lets_no_call_begin_that_waits() -> None:
    llm = long_context("hobbit", n_batch=64)
    tokens = words(llm, LONG)
    running = [in_thread(lambda: llm.eval(tokens)) for _ in range(4)]
    while llm.n_tokens < 128:
        time.sleep(0.001)
    llm.close()
    ends = [type(r.exception(60)) for r in running]
    assert ends.count(EvaluationCancelled) == 1 and ends.count(StateError) == 3, ends


def test_cancels_at_random_moments() -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, **small_pool("hobbit"))
    tokens = words(llm, 100)
    want = logits(llm, tokens, 50)
    over = threading.Event()

    def disturb() -> None:
        rng = np.random.default_rng(0)
        while not over.wait(rng.random() * 0.004):
            llm.cancel()

    other = in_thread(disturb)
    cancelled = 0
    begin = time.monotonic()
    while time.monotonic() - begin < 1.5:
        try:
            assert np.array_equal(want, logits(llm, tokens, 50))
        except EvaluationCancelled:
            cancelled += 1
    over.set()
    other.result()
    assert cancelled > 0
    assert np.array_equal(want, logits(llm, tokens, 50))
    llm.close()
