"""Finding the value of a setting at which it reads as many bytes a token as another: a search over a falling function."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Optional, Tuple

_CLOSE = 0.03


@dataclass(frozen=True)
class Tuned:
    """The value found, the bytes a token it reads, and all that was tried, in order."""

    value: float
    bytes_per_token: float
    target: float
    tried: List[Tuple[float, float]] = field(default_factory=list)


def _nearest(tried: Dict[float, float], target: float) -> Tuned:
    best = min(tried, key=lambda v: abs(tried[v] - target))
    return Tuned(best, tried[best], target, list(tried.items()))


def tune_fraction(measure: Callable[[float], float], at_zero: float, largest: float, target: float, steps: int = 6) -> Tuned:
    """F between 0 and `largest`, by the false position (Illinois) in brackets; stops within 3 % of the target.

    Args:
        measure: bytes a token at a value; falls as the value rises, with some noise.
        at_zero: the bytes at 0, known already.
    """
    tried = {0.0: at_zero}
    if at_zero <= (1 + _CLOSE) * target:
        return _nearest(tried, target)
    if target <= 0:  # nothing is less than what reads least
        return Tuned(largest, measure(largest), target)

    def off(found: float) -> float:  # the curve is nearer to a straight line in logarithms
        return math.log(max(found, 1e-3 * target) / target)

    low: Tuple[float, float] = (0.0, off(at_zero))
    high: Optional[Tuple[float, float]] = None
    guess = min(1.0, largest)
    side = 0
    for _ in range(steps):
        found = measure(guess)
        tried[guess] = found
        if abs(found - target) <= _CLOSE * target or (high is None and found > target and guess >= largest):
            break
        # An end that stays put twice counts for half, or the other creeps (Illinois).
        if found > target:
            low = (guess, off(found))
            if high is not None and side > 0:
                high = (high[0], high[1] / 2)
            side = 1
        else:
            high = (guess, off(found))
            if side < 0:
                low = (low[0], low[1] / 2)
            side = -1
        if high is None:
            guess = min(2 * guess, largest)
        else:
            guess = (low[0] * high[1] - high[0] * low[1]) / (high[1] - low[1])
            margin = 0.05 * (high[0] - low[0])
            guess = min(max(guess, low[0] + margin), high[0] - margin)
    return _nearest(tried, target)


def tune_whole(measure: Callable[[int], float], at_top: float, top: int, target: float) -> Tuned:
    """The whole number below `top` whose bytes a token are nearest; `top` itself only where that is not too much (3 %).

    Args:
        at_top: the bytes of `top`, known already.
    """
    tried = {float(top): at_top}
    low, high = 1, top  # measure(high) is above the target
    if at_top <= (1 + _CLOSE) * target:
        return _nearest(tried, target)
    while low < high:
        guess = min(max(round(top * target / at_top), low), high - 1) if len(tried) == 1 else (low + high) // 2
        found = measure(guess)
        tried[float(guess)] = found
        if found > target:
            high = guess
        else:
            low = guess + 1
    best = _nearest({v: b for v, b in tried.items() if v < top} or tried, target)
    return replace(best, tried=list(tried.items()))
