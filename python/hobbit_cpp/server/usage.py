"""How many tokens a request took, which upstream tells of whole answers but not of streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Callable

import llama_cpp

from ..llama import Llama

__all__ = ["USAGE", "Usage", "counted"]


class Usage:
    """Tokens of a prompt and of its answer so far."""

    def __init__(self) -> None:
        self.prompt = 0
        self.completion = 0

    def as_openai_has_it(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


# Of the request at hand; threads that work on it are given a copy of its context.
USAGE: ContextVar[Usage] = ContextVar("hobbit_usage")


def counted(llm: Llama) -> Callable[..., Any]:
    """`llm.generate` as it is, which adds to USAGE.

    A chat format may call it several times for one answer, what it generated being a part of the next prompt: the first
    prompt counts. The token that ends an answer does not, as in upstream's figures.
    """
    generate, vocab = llm.generate, llm._model.vocab

    def generate_counted(tokens: Any, *args: Any, **kwargs: Any) -> Iterator[int]:
        usage = USAGE.get(None) or Usage()
        usage.prompt = usage.prompt or len(tokens)
        for token in generate(tokens, *args, **kwargs):
            usage.completion += not llama_cpp.llama_vocab_is_eog(vocab, token)
            yield token

    return generate_counted
