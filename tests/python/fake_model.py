"""A model that is made up, for what the command line does with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hobbit_cpp.stats import OffloadStats


class FakeModel:
    """Says `words`; a word that is an exception is raised instead."""

    def __init__(self, words: list[Any], template: bool = True, offload: bool = True) -> None:
        self.words = words
        self.metadata = {"tokenizer.chat_template": "x"} if template else {}
        self.offload = self.offloaded = offload
        self.n_tokens = 0
        self.evaluated = 0  # since the reset
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.closed = False

    def _evaluate(self, n: int) -> None:
        self.n_tokens += n
        self.evaluated += n

    def _say(self) -> Iterator[tuple[str, str | None]]:
        self._evaluate(7)  # the prompt
        for i, word in enumerate(self.words):
            if isinstance(word, BaseException):
                raise word
            if i > 0:
                self._evaluate(1)
            yield word, None
        yield "", "stop"

    def create_completion(self, prompt: str, *, stream: bool, **sampling: Any) -> Iterator[dict[str, Any]]:
        assert stream
        self.calls.append(("completion", prompt, sampling))
        for text, reason in self._say():
            yield {"choices": [{"text": text, "finish_reason": reason}]}

    def create_chat_completion(
        self, messages: list[dict[str, str]], *, stream: bool, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        assert stream
        self.calls.append(("chat", messages, sampling))
        for i, (text, reason) in enumerate(self._say()):
            if i == 0:
                yield {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
            yield {"choices": [{"delta": {"content": text} if reason is None else {}, "finish_reason": reason}]}

    def offload_stats(self) -> OffloadStats:
        assert self.offload
        n = self.evaluated
        return OffloadStats(
            n_tokens=n,
            selections=10 * n,
            hits_high=5 * n,
            hits_low=n,
            loads_high=2 * n,
            loads_low=n,
            skips=n,
            bytes_demand=600_000 * n,
            bytes_prefetch=400_000 * n,
            peak_memory=3 << 30,
            memory_budget=4 << 30,
            recall={1: 0.5},
        )

    def expert_uses(self) -> dict[str, Any]:
        return {"blocks": [0], "uses": [[3, 1]], "loads": [[1, 1]]}

    def reset_offload_stats(self) -> None:
        assert self.offload
        self.evaluated = 0

    def close(self) -> None:
        self.closed = True
