"""The routing of one model made to fit another: real locality for a model with random weights.

Experts of a trace that has too few of them, or too small a k, are laid side by side: several stretches of the same
trace, each with experts of its own, each giving its most important ones. So each expert is chosen as a real one is, one
token after the other; what different stretches choose is independent. A trace with more experts than the model is folded.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import numpy as np
import numpy.typing as npt

from hobbit_cpp.errors import ParameterError

__all__ = ["fit_routing", "fit_trace"]

Ids = npt.NDArray[Any]
Weights = npt.NDArray[Any]


def fit_routing(
    ids: Ids, weights: Weights, n_trace: int, n_expert: int, k: int, n_rows: Optional[int] = None
) -> Tuple[Ids, Weights, str]:
    """Routing of `n_trace` experts for a model with `n_expert` and top-k.

    Args:
        ids, weights: [tokens, layers, k of the trace].
        n_rows: tokens to make; None: as many as there are.

    Returns:
        ids and weights [n_rows, layers, k], the weights of a token normalised; and what was done, "" when it fitted.

    Raises:
        ParameterError: nothing sensible can be made of it.
    """
    n_tokens, _, k_trace = ids.shape
    if n_trace == n_expert and k_trace == k:
        return ids, weights, ""
    if k > n_expert or n_tokens < 2:
        raise ParameterError(f"a trace of {n_tokens} tokens cannot be made to fit {k} of {n_expert} experts")
    n = max(1, round(n_expert / n_trace), -(-k // k_trace))
    shares = [k // n + (i < k % n) for i in range(n)]
    if max(shares) > k_trace:
        raise ParameterError(f"a trace of top-{k_trace} routing cannot be made to fit top-{k}")
    parts: List[Tuple[Ids, Weights]] = []
    for i, share in enumerate(shares):
        shifted = (np.arange(n_rows or n_tokens) + n_tokens // n * i) % n_tokens
        order = np.argsort(-weights[shifted].astype(np.float32), axis=2, kind="stable")[:, :, :share]
        chosen = np.take_along_axis(ids[shifted], order, axis=2).astype(np.int64) + i * n_trace
        mass = np.take_along_axis(weights[shifted].astype(np.float32), order, axis=2)
        parts.append((chosen, mass / np.maximum(mass.sum(axis=2, keepdims=True), 1e-9) * share))
    out = np.concatenate([p[0] for p in parts], axis=2)
    out = _distinct(out % n_expert, n_expert)
    mass = np.concatenate([p[1] for p in parts], axis=2)
    mass /= np.maximum(mass.sum(axis=2, keepdims=True), 1e-9)
    how = f"a trace of {k_trace} of {n_trace} experts made to fit {k} of {n_expert}"
    how += f": {n} stretches of it side by side" if n > 1 else ""
    return out.astype(np.uint16), mass.astype(np.float32), how


def _distinct(ids: Ids, n_expert: int) -> Ids:
    """An expert that folding made a token choose twice gives way to the next one that is free."""
    out: Ids = ids.copy()
    for j in range(1, out.shape[2]):
        for _ in range(n_expert):
            twice = (out[:, :, :j] == out[:, :, j : j + 1]).any(axis=2)
            if not twice.any():
                break
            out[:, :, j] = np.where(twice, (out[:, :, j] + 1) % n_expert, out[:, :, j])
    return out


def fit_trace(trace: Any, n_expert: int, k: int, n_tokens: int) -> Tuple[Any, str]:
    """`n_tokens` of a `hobbit_cpp.trace.Trace` for a model; and what was done.

    Predictions of a trace that had to be changed are left out: there are none for what it became.
    """
    ids, weights, how = fit_routing(trace.ids, trace.weights, int(trace.n_experts), n_expert, k, n_tokens)
    if not how:
        return trace.head(n_tokens), ""
    lens = np.array([len(ids)], np.int32)
    return type(trace)(ids=ids, weights=weights, lens=lens, n_experts=n_expert, meta=dict(trace.meta)), how
