"""Turn one dense feed-forward layer into a router and experts, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import parallel
from .transformer import activations, select

if TYPE_CHECKING:
    from .transformer import FeedForward, FloatArray, IntArray

#: Tokens looked at where a sample is as good as all of them.
SAMPLE = 16384


@dataclass(frozen=True)
class Recipe:
    """Size of the experts and knobs of the fit.

    ``top_weight`` is the wanted mean of the largest top-k weight. The ridges are
    relative to the mean diagonal of the matrix they are added to.
    """

    n_expert: int
    n_ff: int
    top_k: int
    top_weight: float
    router_ridge: float = 0.01
    first_ridge: float = 0.01
    sweep_ridge: float = 0.15
    sweeps: int = 2


@dataclass(frozen=True)
class FittedLayer:
    """A fitted layer.

    Attributes:
        router: (n_expert, n_embd)
        neurons: dense neurons that each expert keeps, ascending, (n_expert, n_ff)
        down: refitted down projections, (n_expert, n_embd, n_ff)
        output: what the layer gives on the calibration tokens, (tokens, n_embd)
    """

    router: FloatArray
    neurons: IntArray
    down: FloatArray
    output: FloatArray


@dataclass
class _Expert:
    """An expert while it is fitted: its tokens and what they give it.

    Attributes:
        rows: tokens routed to it, (n,)
        neurons: (n_ff,)
        inputs: activations times router weight and token weight, (n, n_ff)
        gram: ``inputs.T @ inputs``
        down: (n_ff, n_embd)
    """

    rows: IntArray
    neurons: IntArray
    inputs: FloatArray
    gram: FloatArray
    down: FloatArray


def ridge_solve(gram: FloatArray, right: FloatArray, ridge: float) -> FloatArray:
    """Solve (gram + ridge * mean diagonal * I) X = right, (n, n) and (n, m)."""
    system = gram.astype(np.float64)
    shift = ridge * system.trace() / len(gram) + 1e-12
    np.fill_diagonal(system, system.diagonal() + shift)
    return np.linalg.solve(system, right.astype(np.float64)).astype(np.float32)


def sample_rows(x: FloatArray) -> FloatArray:
    """At most ``SAMPLE`` evenly spaced rows."""
    return x[:: max(1, -(-len(x) // SAMPLE))]


def cluster(x: FloatArray, n: int, rng: np.random.Generator) -> FloatArray:
    """Balanced spherical k-means of unit rows (tokens, n_embd) -> centres (n, n_embd)."""
    # Far starting points (k-means++), or large E leaves clusters next to empty.
    centres = np.empty((n, x.shape[1]), dtype=np.float32)
    centres[0] = x[rng.integers(len(x))]
    distance = 1.0 - x @ centres[0]
    for number in range(1, n):
        chance = np.maximum(distance, 0).astype(np.float64)
        centres[number] = x[rng.choice(len(x), p=chance / chance.sum())]
        np.minimum(distance, 1.0 - x @ centres[number], out=distance)
    bias = np.zeros(n, dtype=np.float32)
    for turn in range(24):
        similarity = x @ centres.T
        owner = (similarity + bias).argmax(1)
        counts = np.bincount(owner, minlength=n)
        # The bias makes full clusters less attractive; its steps shrink.
        over = np.clip(counts * (n / len(x)) - 1.0, -1.0, 1.0)
        bias -= (0.1 / (1 + turn // 4) * over).astype(np.float32)
        for i in np.nonzero(counts)[0]:
            mean = x[owner == i].sum(0)
            centres[i] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return centres


def fit_router(x: FloatArray, recipe: Recipe, rng: np.random.Generator) -> FloatArray:
    """Router (n_expert, n_embd) from router inputs (tokens, n_embd)."""
    mean = x.mean(0)
    unit = x - mean
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    centres = cluster(sample_rows(unit), recipe.n_expert, rng)
    # The extra column of ones gives the direction that acts as a constant; it lets
    # the loads be evened out although the router has no bias term.
    wanted = np.concatenate([unit @ centres.T, np.ones((len(x), 1), dtype=np.float32)], axis=1)
    solved = ridge_solve(parallel.cross(x, x), parallel.cross(x, wanted), recipe.router_ridge)
    few = sample_rows(x)
    scores, constant = few @ solved[:, :-1], few @ solved[:, -1:]
    spread = float(scores.std())
    bias = np.zeros(recipe.n_expert, dtype=np.float32)
    even = recipe.top_k * len(few) / recipe.n_expert
    for turn in range(40):
        logits = scores + constant * bias
        top = np.argpartition(-logits, recipe.top_k - 1, axis=1)[:, : recipe.top_k]
        load = np.bincount(top.ravel(), minlength=recipe.n_expert) / even
        step = 0.3 * spread / (1 + turn / 8)
        bias -= (step * np.clip(load - 1.0, -1.0, 1.0)).astype(np.float32)
    router = (solved[:, :-1] + solved[:, -1:] * bias).T
    logits = few @ router.T
    best = -np.sort(-logits, axis=1)[:, : recipe.top_k].astype(np.float64)
    best -= best[:, :1]
    low, high = 0.0, 1.0
    while _top_weight(best * high) < recipe.top_weight:
        low, high = high, high * 2
    for _ in range(30):
        middle = (low + high) / 2
        if _top_weight(best * middle) < recipe.top_weight:
            low = middle
        else:
            high = middle
    scaled: FloatArray = np.ascontiguousarray(router * np.float32(high))
    return scaled


def _top_weight(logits: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Mean softmax weight of the first of (tokens, k) sorted logits, its maximum 0."""
    return float((1.0 / np.exp(logits).sum(1)).mean())


def pick_neurons(inner: FloatArray, power: FloatArray, n: int) -> IntArray:
    """The ``n`` neurons that contribute most on (tokens, dense n_ff) activations.

    ``power`` holds the squared norms of the dense down columns.
    """
    share = np.einsum("ij,ij->j", inner, inner) * power
    return np.sort(np.argpartition(-share, n - 1)[:n])


def _independent(
    x: FloatArray, ffn: FeedForward, recipe: Recipe, router: FloatArray, token_weight: FloatArray
) -> tuple[list[_Expert], FloatArray]:
    """Fit each expert on its own to the dense layer; also give the dense output."""
    logits = parallel.times(x, router.T)
    chosen, weights = select(logits, recipe.top_k)
    inner = np.concatenate(parallel.each(lambda rows: activations(x[rows], ffn), parallel.blocks(len(x))))
    target = parallel.times(inner, ffn.down.T)
    power = np.einsum("ij,ij->j", ffn.down, ffn.down)

    def fit(number: int) -> _Expert:
        rows, slots = np.nonzero(chosen == number)
        scale = weights[rows, slots, None] * token_weight[rows, None]
        picked = inner[rows]
        # An expert that few tokens choose has too few rows for its unknowns: it also
        # learns, lightly, from the tokens that were nearest to choosing it.
        lack = max(0, recipe.n_ff - len(rows))
        if lack:
            score = logits[:, number].copy()
            score[rows] = -np.inf
            near = np.sort(np.argpartition(-score, lack)[:lack])
            picked = np.concatenate([picked, inner[near]])
        columns = pick_neurons(picked, power, recipe.n_ff)
        inputs = np.take(picked, columns, axis=1)
        own, extra = inputs[: len(rows)], inputs[len(rows) :]
        own *= scale
        gram = own.T @ own
        whole, right = gram, own.T @ (target[rows] * scale)
        if lack:
            light = 0.1 * token_weight[near, None]
            extra *= light
            whole = whole + extra.T @ extra
            right += extra.T @ (target[near] * light)
        # The ridge pulls towards the dense columns, not towards zero.
        start = np.ascontiguousarray(ffn.down[:, columns].T)
        right -= whole @ start
        down = start + ridge_solve(whole, right, recipe.first_ridge)
        return _Expert(rows, columns, own, gram, down)

    return parallel.each(fit, range(recipe.n_expert)), target


def fit_layer(
    x: FloatArray, ffn: FeedForward, recipe: Recipe, rng: np.random.Generator, token_weight: FloatArray
) -> FittedLayer:
    """Fit router and experts to a dense layer.

    Args:
        x: router inputs, (tokens, n_embd)
        ffn: the dense layer
        recipe: sizes and ridges
        rng: starts the clustering
        token_weight: how much an error on each token counts, (tokens,)
    """
    router = fit_router(x, recipe, rng)
    experts, target = _independent(x, ffn, recipe, router, token_weight)
    # Rows of the error are scaled by the token weight, as the inputs of the experts.
    error = target * token_weight[:, None]
    for expert in experts:
        error[expert.rows] -= parallel.times(expert.inputs, expert.down)
    # Independent experts are redundant; corrections against what the whole layer
    # still gets wrong make each one matter. A weak ridge would entangle them.
    for _ in range(recipe.sweeps):
        for expert in experts:
            left = error[expert.rows]
            right = parallel.cross(expert.inputs, left)
            change = ridge_solve(expert.gram, right, recipe.sweep_ridge)
            expert.down += change
            left -= parallel.times(expert.inputs, change)
            error[expert.rows] = left
    error /= token_weight[:, None]
    target -= error
    return FittedLayer(
        router=router,
        neurons=np.stack([expert.neurons for expert in experts]),
        down=np.stack([expert.down.T for expert in experts]),
        output=target,
    )
