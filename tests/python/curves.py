"""Quality curves that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np

from hobbit_cpp.calibrate import curve as cv


def made_up_weights(k: int, tokens: int = 4000, layers: int = 2) -> Any:
    return np.random.default_rng(k).dirichlet(np.ones(k), (tokens, layers)).astype(np.float32)


SENSITIVITY = (1.0, 0.4)


def made_up_curve(k: int = 4, kl: Any = lambda low, skipped: 0.02 * low + 0.4 * skipped, ratio: float = 1.0) -> cv.Curve:
    grid = [(a, s) for s in cv.SKIPPED_SHARES for a in cv.LOW_SHARES if a or s]
    points = tuple(cv.Point(a, s, 0, 1, (0, 0, 0), ratio * kl(a, s), 1e-6, kl(a, s), 1) for a, s in grid)
    return cv.Curve(k, 0.5, SENSITIVITY, *cv.quantiles_by_cost(made_up_weights(k), SENSITIVITY), points)
