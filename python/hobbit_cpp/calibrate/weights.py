"""Weights of eviction rule eq. 3 (HOBBIT, arXiv 2411.01433) by the miss penalty on recorded routing.

The paper does not publish its weights, only that they minimise the miss penalty on calibration text: a high-precision miss costs
1, a low-precision one bytes_low / bytes_high. `Replay` counts it with the engine's own rules.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..errors import MemoryBudgetError
from ..params import OffloadParams
from ..replay import Replay, ReplaySettings
from ..trace import Trace

Weights = Tuple[float, float, float, float]

CACHES = (0.125, 0.25, 0.5)
"""Shares of all experts: what is found has to do well at each."""
EVEN: Weights = (0.25, 0.25, 0.25, 0.25)
_COARSE = 4
_FINEST = 32
EXPECTED_STEPS = 60
"""Calls of `step`, about."""
_SHOWN = ("lru", "lfu", "lcu", "foresight")

__all__ = ["CACHES", "EVEN", "Penalties", "find_weights"]


@dataclass
class Penalties:
    """Miss penalty by rule or weights on one trace: the mean over `CACHES`, each by that of LRU."""

    trace: Trace
    bytes_high: int
    bytes_low: int
    thresholds: Tuple[float, float]

    def __post_init__(self) -> None:
        self._replay = Replay(self.trace, bytes_high=self.bytes_high, bytes_low=self.bytes_low)
        self._known: Dict[Tuple[str, Optional[Weights]], float] = {}
        self._lru: Dict[float, float] = {}
        for cache in CACHES:
            try:
                penalty = self._penalty("lru", cache, None)
            except MemoryBudgetError:  # a tiny model
                continue
            if penalty > 0:
                self._lru[cache] = penalty

    def _penalty(self, rule: str, cache: float, weights: Optional[Weights]) -> float:
        t1, t2 = self.thresholds
        params = OffloadParams(t1=t1, t2=t2, eviction_weights=weights)
        return self._replay.run(rule, cache, ReplaySettings(prefetch=0, params=params)).miss_penalty

    def of(self, rule: str, weights: Optional[Weights] = None) -> float:
        """Below 1: better than LRU."""
        key = (rule, weights)
        if key not in self._known:
            shares = [self._penalty(rule, cache, weights) / lru for cache, lru in self._lru.items()]
            self._known[key] = sum(shares) / len(shares) if shares else 1.0
        return self._known[key]


def find_weights(train: Penalties, held_out: Penalties, step: Callable[[], None]) -> Tuple[Optional[Weights], Dict[str, Any]]:
    """(weights, report); None for weights that do no better than even ones on the held-out part.

    All corners, edges and the middle of the simplex in steps of 1/4, then from the best of them a descent: 1/8, 1/16, 1/32 moved
    from one weight to another as long as that helps. `step` is called now and then.
    """

    def cost(weights: Weights) -> float:
        step()
        return train.of("hobbit", weights)

    grid: List[Weights] = [
        (a / _COARSE, b / _COARSE, c / _COARSE, (_COARSE - a - b - c) / _COARSE)
        for a, b, c in itertools.product(range(_COARSE + 1), repeat=3)
        if a + b + c <= _COARSE
    ]
    best = min(grid, key=cost)
    part = 2 * _COARSE
    while part <= _FINEST:
        better = min(_neighbours(best, 1 / part), key=cost, default=best)
        if cost(better) < cost(best):
            best = better
        else:
            part *= 2
    rows = {
        name: {"train": p.of(rule, weights), "held_out": held_out.of(rule, weights)}
        for name, rule, weights in [*((r, r, None) for r in _SHOWN), ("even", "hobbit", EVEN), ("found", "hobbit", best)]
        for p in [train]
    }
    report = {
        "found": list(best),
        "penalty_by_lru": rows,
        "caches": list(CACHES),
        "tokens": {"train": train.trace.n_tokens, "held_out": held_out.trace.n_tokens},
    }
    kept = rows["found"]["held_out"] < rows["even"]["held_out"]
    return (best if kept else None), report


def _neighbours(weights: Weights, part: float) -> List[Weights]:
    out: List[Weights] = []
    for give, take in itertools.permutations(range(4), 2):
        if weights[give] >= part:
            moved = list(weights)
            moved[give] -= part
            moved[take] += part
            out.append((moved[0], moved[1], moved[2], moved[3]))
    return out
