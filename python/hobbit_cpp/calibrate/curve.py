"""The quality curve: what it costs to serve less in high precision, as a function of how much.

A point of the plane is (low, skipped): `skipped`, the share of all selections that is left out; `low`, the share of the others
that is served in low precision, those that lose least by it first. (0, 0) is exact, (1, 0) serves all low. What a selection
loses goes by its share g of the token's router weight and by its layer: layers differ by a factor of ten in what their low
precision does to the model's predictions. So in place of HOBBIT's score (arXiv 2411.01433, eq. 2) it is 1 - a g that T1 is
compared with, where the sensitivity a of a layer is measured, see `sensitivity_of`, and 1 - g that T2 is compared with; both are
quantiles of the model's own scores. The top-1 of a token is never skipped. At equal shares, a divergence is 15 to 25 % below that
by eq. 2. (What skipping does to layers is different again: a sensitivity of its own for T2 gained nothing over 1 - g, and the one
of low precision lost up to a tenth.)

Measured is a small grid, with the rule "weight", which decides by scores alone. The default rule "miss" serves in high
precision whatever is cached, so it loses less: the curve is an upper bound for it. How the loss at a point is estimated: the
Kullback-Leibler divergence from exact mode has far less noise than a change of perplexity. It has three parts, and the loss is in
proportion to two of them:

- what any change makes, however small: near ties between experts fall the other way, and what follows is another draw of the same
  noise. A draw is as good as another, so perplexity has nothing of it in the mean. By second order, what low precision does
  besides is in proportion to the sum of (a g)^2 over what is low; the rest of the smallest point is this part.
- what low precision adds to it, which is an error in all directions: loss by divergence is about 1 where a model's probabilities
  are right.
- what skipping adds to both: a part of each layer's output is missing, always to the same side, and the loss is about twice the
  divergence on one model.

Both ratios are fitted to the points, and count with the upper end of their one-sided 95 % intervals (by the noise of the text
alone); no divergence counts less than `RATIO_FLOOR`, and no point less than was measured there for certain. In between the points
the loss is bilinear, and it never falls as less is served in high precision.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LOW_SHARES = (0.0, 0.1, 0.3, 0.6, 0.85, 1.0)
SKIPPED_SHARES = (0.0, 0.05, 0.15)
"""The grid, closer at the beginning, where the divergence rises steeply: a little noise is enough for other experts to be chosen;
and at the end, where the top-1 of sensitive layers come in."""
PAPER_SHARES = (0.67, 0.30, 0.03)
"""High, low, skipped of all selections (HOBBIT, section 3.2)."""
PAPER_THRESHOLDS = (0.6, 0.9)
RATIO_FLOOR = 0.25
"""A lower ratio is luck, and no divergence counts less."""
_LEAST_SENSITIVE = 0.1
"""Of the mean divergence of a layer: less is luck."""
_ROUNDING = 1e-6  # of quantiles as they are stored, and more than that of the scores
_UPPER = 1.64
_LATTICE = (101, 61)
_N_QUANTILES = 401


@dataclass(frozen=True)
class Point:
    """A point of the grid, measured on the calibration text against exact mode on the same tokens.

    Attributes:
        low, skipped: where it stands in the plane, see the module.
        t1, t2: its thresholds.
        served: shares of all selections served high, low and not at all, as counted.
        loss: mean log-likelihood lost a token, in nats; exp(loss) - 1 is the change of perplexity. loss_se: its standard error.
        kl: mean divergence from exact mode, nats a token. top1: share of the tokens with the same likeliest next one.
    """

    low: float
    skipped: float
    t1: float
    t2: float
    served: Tuple[float, float, float]
    loss: float
    loss_se: float
    kl: float
    top1: float


def scores_beyond_first(weights: npt.NDArray[Any]) -> Floats:
    """Unimportance scores s[1] ... s[k-1] (eq. 2) of all selections but the top-1 of each token and layer.

    Args:
        weights: router weights [tokens, layers, k], in any order, any sum above 0.
    """
    g = _shares(weights)
    out: Floats = np.cumsum(g, axis=-1)[..., :-1][g[..., 1:] > 0]
    return out


def _shares(weights: npt.NDArray[Any]) -> Floats:
    """Of the token's router weight, the largest first. A layer of fewer experts a token than k has 0 for the others."""
    g: Floats = -np.sort(-weights.astype(np.float64), axis=-1)
    g /= np.maximum(g.sum(-1, keepdims=True), 1e-30)
    return g


def grid(k: int) -> List[Tuple[float, float]]:
    """(low, skipped) of the points to be measured with k experts a token."""
    return [(low, skipped) for skipped in skipped_shares(k) for low in LOW_SHARES if low or skipped]


def skipped_shares(k: int) -> Tuple[float, ...]:
    """Of the grid, with k experts a token."""
    return SKIPPED_SHARES if k > 1 else (0.0,)


def sensitivity_of(kl: Sequence[float]) -> Tuple[float, ...]:
    """How much each layer suffers from low precision, the most sensitive one 1.

    Args:
        kl: divergence from exact mode with all experts of that layer low, and those of the others high.

    An error in a layer's output is in proportion to the router weight of what is low, and a divergence to the square of the
    error, so the selections to be served low first are those of the smallest a g with a in proportion to the root.
    """
    floored = np.maximum(np.asarray(kl, np.float64), _LEAST_SENSITIVE * np.mean(kl))
    most = float(floored.max())
    return tuple(round(float(x), 4) for x in np.sqrt(floored / most)) if most > 0 else (1.0,) * len(kl)


def quantiles_of(scores: Floats) -> Tuple[float, ...]:
    """At even steps from 0 to 1; of no scores at all those of the least important."""
    if not scores.size:
        return (1.0,) * _N_QUANTILES
    return tuple(round(float(x), 6) for x in np.quantile(scores, np.linspace(0, 1, _N_QUANTILES)))


def threshold_at(quantiles: Sequence[float], share: float) -> float:
    """What `share` of the scores do not exceed; of none 0, of all 1. Of scores that are equal to it none does, as floats."""
    if share <= 0 or share >= 1:
        return 0.0 if share <= 0 else 1.0
    return min(1.0, float(np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles)) + _ROUNDING)


def quantiles_by_cost(
    weights: npt.NDArray[Any], sensitivity: Sequence[float]
) -> Tuple[Tuple[Tuple[float, ...], ...], Tuple[float, ...]]:
    """What T1 and T2 are taken from.

    Args:
        weights: as for `scores_beyond_first`; sensitivity: of each layer.

    Returns:
        Quantiles of 1 - a g over what is left by each of the grid's shares skipped, and of 1 - g over all but the top-1.
    """
    g = _shares(weights)
    chosen = g > 0
    by_weight = quantiles_of(1 - g[..., 1:][chosen[..., 1:]])
    s = 1 - np.asarray(sensitivity)[None, :, None] * g
    rows = []
    for skipped in skipped_shares(weights.shape[-1]):
        kept = 1 - g <= skipping_threshold(by_weight, skipped, weights.shape[-1])
        kept[..., 0] = True
        rows.append(quantiles_of(s[chosen & kept]))
    return tuple(rows), by_weight


def skipping_threshold(by_weight: Sequence[float], skipped: float, k: int) -> float:
    """T2 that skips a share of all selections, k of a token."""
    return threshold_at(by_weight, 1 - skipped / (1 - 1 / k)) if skipped > 0 else 1.0


def paper_quantiles(weights: npt.NDArray[Any]) -> Tuple[float, float]:
    """T1, T2 on the scores of eq. 2: 67 % of all selections high, 30 % low, 3 % skipped, as far as the top-1 leaves so many."""
    if weights.shape[-1] < 2:
        return PAPER_THRESHOLDS
    high, _, skipped = PAPER_SHARES
    scores = scores_beyond_first(weights)
    n_first = weights.size / weights.shape[-1]
    first = n_first / (n_first + scores.size)
    quantiles = quantiles_of(scores)
    t1 = threshold_at(quantiles, (high - first) / (1 - first))
    t2 = threshold_at(quantiles, 1 - skipped / (1 - first))
    return min(t1, t2), t2


@dataclass(frozen=True)
class Curve:
    """What was measured, and what follows from it.

    Attributes:
        k: experts a token. With one, nothing is skipped.
        low_cost: bytes of a low-precision copy by those of a high one.
        sensitivity: of each MoE layer, see `sensitivity_of`.
        quantiles, by_weight: what T1 and T2 are taken from, see `quantiles_by_cost`.
        points: the grid without (0, 0), see `grid`.
    """

    k: int
    low_cost: float
    sensitivity: Tuple[float, ...]
    quantiles: Tuple[Tuple[float, ...], ...]
    by_weight: Tuple[float, ...]
    points: Tuple[Point, ...]

    def thresholds(self, low: float, skipped: float) -> Tuple[float, float]:
        """T1, T2 of a point of the plane."""
        rows = [threshold_at(row, 1 - low) for row in self.quantiles]
        return float(np.interp(skipped, skipped_shares(self.k), rows)), skipping_threshold(self.by_weight, skipped, self.k)

    def shares(self, low: Any, skipped: Any) -> Tuple[Any, Any, Any]:
        """Of all selections: served high, low, skipped."""
        kept = 1 - skipped
        return (1 - low) * kept, low * kept, skipped

    def asked(self, low: Any, skipped: Any) -> Any:
        """Bytes a token needs, cached or not, by those of exact mode."""
        high, lower, _ = self.shares(low, skipped)
        return high + self.low_cost * lower

    @functools.cached_property
    def _axes(self) -> Tuple[Floats, Floats]:
        """The grid's values of `low` and of `skipped`."""
        return np.array(sorted({p.low for p in self.points} | {0.0})), np.array(sorted({p.skipped for p in self.points} | {0.0}))

    def _at_points(self, value: Callable[[Point], float], at_exact: float) -> Floats:
        """[low, skipped]"""
        at = {(p.low, p.skipped): value(p) for p in self.points}
        at[0.0, 0.0] = at_exact
        lows, skips = self._axes
        return np.array([[at[float(a), float(b)] for b in skips] for a in lows])

    @functools.cached_property
    def noise(self) -> float:
        """The divergence that any change makes, nats a token.

        The line of second order through the smallest point and each of the others, where nothing is low: the smallest, so that a
        divergence that rises otherwise is not taken for noise.
        """
        (least, kl), *others = sorted((p.low, p.kl) for p in self.points if p.skipped == 0)
        squares = (1 - np.asarray(self.quantiles[0])) ** 2
        sums = np.cumsum(np.append(0.0, (squares[:-1] + squares[1:])[::-1]))
        parts = [np.interp([least, low], np.linspace(0, 1, len(sums)), sums) for low, _ in others]
        lines = [(kl - a / b * other) / (1 - a / b) for (a, b), (_, other) in zip(parts, others) if b > a]
        return max(0.0, min(kl, *lines)) if lines else 0.0

    @functools.cached_property
    def _divergence(self) -> Tuple[Floats, Floats]:
        """What low precision adds to the noise, [low, 1], and what skipping adds to both, [low, skipped]; never falling."""
        kl = self._at_points(lambda p: p.kl, self.noise)
        by_low = np.maximum.accumulate(np.maximum(kl[:, :1], self.noise))
        return by_low - self.noise, np.maximum.accumulate(np.maximum(kl - by_low, 0), 1)

    @functools.cached_property
    def ratios(self) -> Tuple[Tuple[float, float], Tuple[float, float]]:
        """Loss by divergence, of low precision and of skipping, each with its standard error."""
        by_low, by_skipping = self._divergence
        loss, variance = self._at_points(lambda p: p.loss, 0.0), self._at_points(lambda p: max(p.loss_se, 1e-9) ** 2, 1.0)
        # What is added is taken to be as noisy as if it were added to exact mode; the pairs of points are not kept.
        added = np.maximum(variance - variance[:, :1], variance[:1])
        of_low = _slope(by_low[1:, 0], loss[1:, 0], variance[1:, 0])
        return of_low, _slope(by_skipping[:, 1:], (loss - loss[:, :1])[:, 1:], added[:, 1:])

    @functools.cached_property
    def _fitted(self) -> Tuple[Floats, Floats, Floats]:
        """The grid: values of `low` and of `skipped`, and the loss at each pair of them, which rises along both."""
        low, skipped = self._axes
        z = sum(max(r + _UPPER * se, RATIO_FLOOR) * kl for (r, se), kl in zip(self.ratios, self._divergence))
        # Neither is the noise quite for nothing, nor less lost than was measured for certain.
        least = self._at_points(lambda p: max(RATIO_FLOOR * p.kl, p.loss - _UPPER * p.loss_se), 0.0)
        z = np.maximum.accumulate(np.maximum.accumulate(np.maximum(z, least), 0), 1)
        if len(skipped) == 1:
            skipped, z = np.array([0.0, 1.0]), np.hstack([z, z])  # two columns, to be between
        return low, skipped, z

    def loss(self, low: Any, skipped: Any) -> Any:
        """Estimated loss at points of the plane, nats a token."""
        xs, ys, z = self._fitted
        low, skipped = np.broadcast_arrays(np.asarray(low, float), np.asarray(skipped, float))
        i, u = _cell(xs, low)
        j, v = _cell(ys, skipped)
        lower = z[i, j] * (1 - u) + z[i + 1, j] * u
        upper = z[i, j + 1] * (1 - u) + z[i + 1, j + 1] * u
        return lower * (1 - v) + upper * v

    @functools.cached_property
    def frontier(self) -> List[Tuple[float, float, float, float]]:
        """(loss, bytes asked by those of exact mode, low, skipped): from exact on, each with fewer bytes than what loses less."""
        most_low, most_skipped = max(p.low for p in self.points), max(p.skipped for p in self.points)
        n_skipped = _LATTICE[1] if most_skipped > 0 else 1
        axes = np.linspace(0, most_low, _LATTICE[0]), np.linspace(0, most_skipped, n_skipped)
        low, skipped = np.meshgrid(*axes, indexing="ij")
        loss, asked = self.loss(low, skipped).ravel(), self.asked(low, skipped).ravel()
        order = np.lexsort((asked, loss))
        out: List[Tuple[float, float, float, float]] = []
        for i in order:
            if not out or asked[i] < out[-1][1] - 1e-9:
                out.append((float(loss[i]), float(asked[i]), float(low.flat[i]), float(skipped.flat[i])))
        return out

    def at_change(self, change: float) -> Tuple[float, float]:
        """(low, skipped): the fewest bytes at a change of perplexity of at most `change` (0.01: 1 %)."""
        return self.at_loss(math.log1p(change))

    def at_loss(self, loss: float) -> Tuple[float, float]:
        """(low, skipped): the fewest bytes at a loss of at most so many nats a token."""
        return next((p[2], p[3]) for p in reversed(self.frontier) if p[0] <= loss + 1e-12)

    def at_asked(self, share: float) -> Tuple[float, float]:
        """(low, skipped): the least loss at bytes asked of at most `share` of exact mode's; if none is, the fewest bytes."""
        return next(((p[2], p[3]) for p in self.frontier if p[1] <= share), self.frontier[-1][2:])

    def plain(self) -> Dict[str, Any]:
        """A few qualities and what they come to, for people and JSON."""
        out: Dict[str, Any] = {}
        for percent in (0.5, 1.0, 2.0, 5.0):
            low, skipped = self.at_change(percent / 100)
            high, lower, left_out = self.shares(low, skipped)
            t1, t2 = self.thresholds(low, skipped)
            asked = float(self.asked(low, skipped))
            served = {"high": float(high), "low": float(lower), "skipped": float(left_out)}
            out[f"{percent:g}%"] = {**served, "bytes": asked, "t1": t1, "t2": t2}
        return out


def _slope(x: Floats, y: Floats, variance: Floats) -> Tuple[float, float]:
    """Of a line through 0, and its standard error; 1 where there is nothing to fit.

    By least squares, each point by its own noise. All points are of the same text, so their errors go the same way: the error is
    that of one point, the best.
    """
    weight = x**2 / variance
    if not weight.any():
        return 1.0, 0.0
    return float((x * y / variance).sum() / weight.sum()), float(1 / math.sqrt(weight.max()))


def _cell(edges: Floats, at: Floats) -> Tuple[npt.NDArray[np.int64], Floats]:
    """Index of the interval that holds each value, and how far into it, 0 to 1."""
    i = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, len(edges) - 2)
    return i, np.clip((at - edges[i]) / (edges[i + 1] - edges[i]), 0, 1)
