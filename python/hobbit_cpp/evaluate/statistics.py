"""The figures, and how sure they are. Logarithms are natural; intervals are 95 %."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]

Z95 = 1.959963984540054
"""Standard errors on either side of a 95 % interval."""
_RESAMPLES = 2000
# Neighbouring tokens are alike, so whole runs of them are drawn; of at least so many that their number says something.
_LONGEST_BLOCK = 32
_MIN_BLOCKS = 40


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; `low` and `high` are nan when nothing can be said."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def map(self, f: Callable[[float], float]) -> Estimate:
        """The same of a rising function of the figure."""
        return Estimate(f(self.value), f(self.low), f(self.high))


def log_softmax(logits: Logits) -> FloatArray:
    """[n, vocabulary] -> log probabilities of each row."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def kl_divergence(log_p: FloatArray, log_q: FloatArray) -> FloatArray:
    """KL(p || q) of each row, in nats: what is lost by coding with q what is distributed as p. Never below zero."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(np.maximum(terms.sum(-1), 0.0))


def block_starts(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where blocks of neighbours begin; `groups`: the window of each value. No block crosses a window."""
    n = len(groups)
    length = max(1, min(_LONGEST_BLOCK, n // _MIN_BLOCKS))
    starts: List[int] = []
    for begin, end in zip(*_runs(groups)):
        starts += range(begin, end, length)
    return np.array(starts, np.int64)


def _runs(groups: npt.NDArray[np.int64]) -> Tuple[Sequence[int], Sequence[int]]:
    edges = np.flatnonzero(np.diff(groups)) + 1
    return [0, *edges.tolist()], [*edges.tolist(), len(groups)]


def mean_of_blocks(values: FloatArray, groups: Optional[npt.NDArray[np.int64]] = None) -> Estimate:
    """Mean with a bootstrap interval over blocks of neighbours (percentiles of 2000 resamples, a fixed seed).

    Args:
        values: one a token, in the order of the text.
        groups: the window of each; None: all of one.
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan)
    mean = float(values.mean())
    starts = block_starts(np.zeros(n, np.int64) if groups is None else groups)
    if len(starts) < 2:
        return Estimate(mean)
    sums, sizes = np.add.reduceat(values, starts), np.diff([*starts.tolist(), n])
    rng = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = rng.integers(len(starts), size=len(starts))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    return Estimate(mean, *np.quantile(means, (0.025, 0.975)).tolist())


def quantile_of_blocks(values: FloatArray, q: float, groups: npt.NDArray[np.int64], resamples: int = 400) -> Estimate:
    """A quantile with the same kind of interval."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan)
    value = float(np.quantile(values, q))
    blocks = np.split(values, block_starts(groups)[1:])
    if len(blocks) < 2:
        return Estimate(value)
    rng = np.random.default_rng(0)
    found = [
        float(np.quantile(np.concatenate([blocks[j] for j in rng.integers(len(blocks), size=len(blocks))]), q))
        for _ in range(resamples)
    ]
    return Estimate(value, *np.quantile(found, (0.025, 0.975)).tolist())


def wilson(right: int, n: int) -> Estimate:
    """A share with Wilson's score interval, which stays within 0 and 1."""
    if n == 0:
        return Estimate(math.nan)
    p = right / n
    middle = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    half = Z95 / (1 + Z95 * Z95 / n) * math.sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half))
