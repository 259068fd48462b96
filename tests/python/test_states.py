"""Saved states, caches, and sampling from what there is: the text of stock llama.cpp, or an error, but no end of the process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, List

import pytest

import hobbit_cpp._lib as _lib
from decode import words
from hobbit_cpp import StateError
from test_llama_api import make, offloaded

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

llama_cpp: Any = _lib.load_bindings()
BOTH = pytest.mark.parametrize("new", [make, offloaded], ids=["stock", "offloaded"])


def test_states_and_caches(tmp_path: Path) -> None:
    stock, llm = make(), offloaded()
    tokens = words(llm, 90)
    for model in (stock, llm):
        model.eval(tokens)
    state = llm.save_state()
    # A batch of logits that nobody asked for is no part of it.
    assert state.scores.nbytes <= 4 * llm.n_vocab()
    want = [t for t, _ in zip(stock.generate(tokens, temp=0), range(6))]
    llm.reset()
    llm.eval(tokens[::-1])
    for from_ in (state, pickle.loads(pickle.dumps(state)), stock.save_state()):
        llm.load_state(from_)
        llm.n_tokens = min(llm.n_tokens, len(tokens))
        assert [t for t, _ in zip(llm.generate(tokens, temp=0), range(6))] == want
    stock.load_state(make_state(llm, tokens))
    assert [t for t, _ in zip(stock.generate(tokens, temp=0), range(6))] == want
    for cache in (llama_cpp.LlamaRAMCache(1 << 24), llama_cpp.LlamaDiskCache(str(tmp_path))):
        llm.set_cache(cache)
        for prompt in (tokens[:50], tokens[20:], tokens[:50]):
            got = llm.create_completion(prompt, max_tokens=5, temperature=0)["choices"][0]["text"]
            assert got == stock.create_completion(prompt, max_tokens=5, temperature=0)["choices"][0]["text"]
    stock.close()
    llm.close()


def make_state(llm: Any, tokens: List[int]) -> Any:
    llm.reset()
    llm.eval(tokens)
    return llm.save_state()


@BOTH
def test_a_state_of_another_context(new: Any) -> None:
    small, large = new(n_ctx=256), new(n_ctx=1024)
    tokens = words(large, 90)
    small.eval(tokens)
    large.load_state(small.save_state())
    text = words(large, 600)
    large.eval(text[90:])
    assert large.n_tokens == 600 and large.input_ids[599] == text[599]
    small.close()
    large.close()


@BOTH
def test_a_state_that_cannot_be_loaded_leaves_nothing_behind(new: Any) -> None:
    llm, other = new(), new(type_k=8, flash_attn=True)
    tokens = words(llm, 40)
    want = [t for t, _ in zip(other.generate(tokens, temp=0), range(6))]
    llm.eval(tokens)
    other.eval(tokens[:5])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="state"):
            other.load_state(llm.save_state())
        assert other.n_tokens == 0
        assert [t for t, _ in zip(other.generate(tokens, temp=0), range(6))] == want
    llm.close()
    other.close()


@BOTH
def test_the_same_prompt_twice(new: Any) -> None:
    llm = new(logits_all=True)
    for _ in range(2):
        answer = llm.create_completion(words(llm, 12), max_tokens=1, logprobs=2, temperature=0)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 1
    llm.close()


@BOTH
def test_there_must_be_logits_to_sample_from(new: Any) -> None:
    llm = new()
    tokens = words(llm, 12)
    with pytest.raises(StateError, match="no logits"):
        llm.sample()
    llm.eval(tokens)
    assert llm.sample(temp=0) == llm.sample(temp=0, idx=11)
    for idx in (0, 10, 12):
        with pytest.raises(ValueError, match=f"no logits of token {idx}"):
            llm.sample(idx=idx)
    llm.load_state(llm.save_state())
    with pytest.raises(StateError, match="load_state"):
        llm.sample()
    answer = llm.generate(tokens, temp=0)
    next(answer)
    with pytest.raises(ValueError, match="logits_all"):
        answer.send([1, 2])
    llm.close()
    llm = new(logits_all=True)
    llm.eval(tokens)
    llm.eval([])
    assert len([llm.sample(temp=0, idx=i) for i in range(12)]) == 12
    llm.eval(tokens[:3])
    llm.sample(idx=12)
    with pytest.raises(ValueError, match="no logits of token 11"):
        llm.sample(idx=11)
    llm.close()
