"""What `hobbit report` draws beyond counts: the time line of one token, memory over time, reuse of experts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import _memory

if TYPE_CHECKING:
    import numpy.typing as npt

    from ._observed import Observed

# hobbit_event_kind of csrc/hobbit.h, by number.
EVENT_KINDS = ("decode", "route", "experts", "stall", "read", "prefetch")
MAX_TOKENS = 4096
"""Of which the reuse of experts is counted, the first: the routing of more would be memory that no budget has (2.3 kB a token of
Qwen3-30B-A3B)."""
_SECONDS_BETWEEN_SAMPLES = 0.05
_MAX_SAMPLES = 2000


class MemorySamples:
    """What the process holds, over time. Of a long run only every second sample is kept, again and again."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._step = _SECONDS_BETWEEN_SAMPLES
        self.samples: List[Tuple[float, int]] = []

    def take(self) -> None:
        """One more, when the last is old enough."""
        now = time.perf_counter() - self._begin
        if self.samples and now - self.samples[-1][0] < self._step:
            return
        self.samples.append((now, _memory.resident()))
        if len(self.samples) >= _MAX_SAMPLES:
            del self.samples[1::2]
            self._step *= 2


def reuse_distances(ids: npt.NDArray[Any], n_experts: int, known: Optional[npt.NDArray[Any]] = None) -> npt.NDArray[Any]:
    """How many other experts of the layer were used since an expert was used last, for all selections.

    An LRU cache of c experts per layer serves exactly what is reused at a distance below c. The experts of a token are used
    one after the other, in the order of `ids`.

    Args:
        ids: [tokens, layers, k].
        known: [tokens, layers, k], those ids that are selections; None: all.

    Returns:
        [layers, n_experts + 1] counts by distance; the last: used for the first time.
    """
    import numpy as np

    n_tokens, n_layers, k = ids.shape
    counts = np.zeros((n_layers, n_experts + 1), np.int64)
    last = np.full((n_layers, n_experts), -1, np.int64)  # time of the last use
    all_layers = np.arange(n_layers)
    earlier = np.tri(k, k=-1, dtype=bool)  # [j, i]: i comes before j in a token
    for token in range(n_tokens):
        rows = all_layers if known is None else all_layers[known[token].any(-1)]
        used = np.ones((len(rows), k), bool) if known is None else known[token, rows]
        layers = np.broadcast_to(rows[:, None], used.shape)
        chosen = ids[token, rows].astype(np.int64)
        before = last[layers, chosen]  # [layers, k]
        distance = (last[rows, None, :] > before[:, :, None]).sum(-1)
        # those of this token that were behind it until they were used just now
        distance += ((before[:, None, :] < before[:, :, None]) & earlier & used[:, None, :]).sum(-1)
        distance[before < 0] = n_experts
        np.add.at(counts, (layers[used], distance[used]), 1)
        last[layers[used], chosen[used]] = np.broadcast_to(token * k + np.arange(k), used.shape)[used]
    return counts


def recording(session: Observed, memory: MemorySamples) -> Dict[str, Any]:
    """All of it as plain data; keys as in the "recording" of `hobbit run --record --json-stats`."""
    ids, weights = session.trace_read()
    # Of a prompt, llama.cpp computes the last layer only where logits are wanted: no ids there, and no weights. Neither where a
    # layer selects fewer than others.
    known = weights > 0
    n_experts = session.info.n_expert
    return {
        "timeline": {which: session.timeline(slowest=which == "slowest") for which in ("last", "slowest")},
        "memory": [[seconds, held] for seconds, held in memory.samples],
        "reuse": {
            "tokens": len(ids),
            "experts": n_experts,
            "counts": reuse_distances(ids, n_experts, known).tolist() if len(ids) else [],
        },
    }
