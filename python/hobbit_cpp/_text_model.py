"""A model that a text runs through, for what its layers do with it: traces and importance matrices."""

from __future__ import annotations

import os
from typing import Any, Iterator, Optional, Sequence, Union

from ._handle import fingerprint
from ._memory import Size
from .errors import ParameterError
from .llama import Llama
from .params import OffloadParams

__all__ = ["TextModel", "decode_sequence", "load_for_text"]


class TextModel(Llama):
    """Decoded by `decode_sequence`, a batch at a time: the logits of a batch are kept, those of a whole context are not.

    Args:
        input_rows: of the inputs of experts, the sums over the text and so many rows of a batch are kept; None: neither.
    """

    def __init__(self, *args: Any, input_rows: Optional[int], **kwargs: Any) -> None:
        self._input_rows = input_rows
        super().__init__(*args, **kwargs)

    def _memory_to_come(self) -> int:
        inputs = 0 if self._input_rows is None else self._offloaded().inputs_bytes(self._input_rows)
        return int(self.n_vocab()) * 4 * (16 + self.n_batch) + inputs


def load_for_text(
    model: Union[str, os.PathLike[str]],
    params: OffloadParams,
    *,
    input_rows: Optional[int] = None,
    n_tokens: Optional[int],
    context: int,
    batch: int,
    memory: Optional[Size],
    expert_cache: Optional[Size],
    threads: Optional[int],
) -> TextModel:
    """A model that a text is to run through, for what its layers do with it.

    Args:
        params: without low copies, which are of no use for that; so a sidecar of another model is no obstacle.
        input_rows, batch: see `TextModel`; a batch is not longer than `context`.

    Raises:
        ParameterError: no text, or no token of it.
        NotMoeError: before anything is loaded; and what `Llama` raises.
    """
    if context < 2:
        raise ParameterError("a context of fewer than 2 tokens has no text in it")
    if n_tokens is not None and n_tokens < 1:
        raise ParameterError(f"{n_tokens} tokens are none")
    fingerprint(os.fspath(model))
    batch = min(batch, context)
    return TextModel(
        model,
        input_rows=None if input_rows is None else min(input_rows, batch),
        offload=params,
        memory=memory,
        expert_cache=expert_cache,
        n_ctx=context,
        n_batch=batch,
        n_ubatch=batch,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,  # or the last layer is computed for the last token of a batch only
        verbose=False,
    )


def decode_sequence(llm: Any, tokens: Sequence[int], batch: int) -> Iterator[int]:
    """Computes a sequence from its beginning, and yields how many tokens have been added.

    Not by `llm.eval`: that keeps the logits of a whole context. All of a batch's are asked for, or the last layer would
    be computed for the last token alone.
    """
    session = llm._offloaded()
    llm.reset()
    llm._ctx.kv_cache_clear()
    session.begin_sequence()
    for i in range(0, len(tokens), batch):
        piece = list(tokens[i : i + batch])
        llm._batch.set_batch(batch=piece, n_past=i, logits_all=True)
        with session.decoding(len(piece)):
            llm._ctx.decode(llm._batch)
        yield len(piece)
