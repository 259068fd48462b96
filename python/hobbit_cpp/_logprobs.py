"""Log probabilities of a whole context in the memory of one more copy of its logits."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

__all__ = ["in_pieces"]

_ROWS = 16


def in_pieces(log_softmax: Callable[..., Any]) -> Callable[..., Any]:
    """`log_softmax` (llama_cpp.Llama.logits_to_logprobs) some rows at a time, with the same bits.

    Of a whole context, [tokens, vocabulary], it would hold the logits three times over, which no budget knows of.
    """

    def logits_to_logprobs(logits: Any, axis: int = -1) -> Any:
        if np.ndim(logits) != 2 or axis not in (-1, 1):
            return log_softmax(logits, axis)
        out = np.empty(np.shape(logits), np.single)
        for i in range(0, len(out), _ROWS):
            out[i : i + _ROWS] = log_softmax(logits[i : i + _ROWS])
        return out

    return logits_to_logprobs
