"""Quality curves that are made up."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from hobbit_cpp.calibrate import curve as cv


def made_up_weights(k: int, tokens: int = 4000, layers: int = 2) -> Any:
    return np.random.default_rng(k).dirichlet(np.ones(k), (tokens, layers)).astype(np.float32)


SENSITIVITY = (1.0, 0.4)


def made_up_curve(
    k: int = 4, kl: Any = None, ratio: float = 1.0, skipping: Optional[float] = None, noise: float = 0.0
) -> cv.Curve:
    """A curve of a divergence `noise` + `kl`, of second order in `low` if not given (`cv.Curve.noise`), and losses in proportion.

    Args:
        kl: of (low, skipped). ratio, skipping: of loss to divergence, of low precision and of skipping (default: the same).
    """
    rows, by_weight = cv.quantiles_by_cost(made_up_weights(k), SENSITIVITY)
    squares = np.append(0.0, np.cumsum((1 - np.array(rows[0]))[::-1] ** 2))

    def second_order(low: float, skipped: float) -> float:
        return float(0.02 * np.interp(low, np.linspace(0, 1, len(squares)), squares / squares[-1]) + 0.4 * skipped)

    kl = kl or second_order
    skipping = ratio if skipping is None else skipping
    grid = [(a, s) for s in cv.skipped_shares(k) for a in cv.LOW_SHARES if a or s]
    points = []
    for a, s in grid:
        loss = ratio * kl(a, 0) + skipping * (kl(a, s) - kl(a, 0))
        points.append(cv.Point(a, s, 0, 1, (0, 0, 0), loss, 1e-6, noise + kl(a, s), 1))
    return cv.Curve(k, 0.5, SENSITIVITY, rows, by_weight, tuple(points))
