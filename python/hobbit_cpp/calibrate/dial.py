"""`quality=`: what a user asks for, turned into thresholds by a calibration."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Callable, Optional, Tuple

from .._handle import fingerprint
from ..errors import CalibrationError, HobbitWarning, ParameterError
from ..params import OffloadParams
from ..stats import Served
from .curve import Curve
from .quality import Quality, parse_quality
from .store import Calibration, load_for, low_types

if TYPE_CHECKING:
    from .._session import Session

DEFAULT = "1.5%"
"""Of offload="hobbit" for a model with a calibration."""

# Tokens between two looks at what was read, and over how many it is averaged.
_EVERY = 8
_MEMORY = 64


def resolve(model: str, params: OffloadParams) -> Tuple[OffloadParams, Optional[Calibration]]:
    """Parameters with what `quality` and the calibration say filled in, and the calibration, if there is one that is of use.

    A quality in bytes or per cent is left to `begin`.

    Raises:
        ParameterError: a quality that needs a calibration, and there is none; it says what to run.
        HobbitError: the model cannot be read.
    """
    for_thresholds = params.mode == "hobbit" and not params.exact and params.precision_rule != "drop" and params.t1 is None
    for_weights = params.eviction == "hobbit" and params.eviction_weights is None
    if not for_thresholds and not for_weights:
        return params, None
    found: Optional[Calibration] = None
    why = ""
    try:
        found = load_for(model, params)
    except CalibrationError as e:
        why = f" ({e})"
        warnings.warn(f"{e}. It is not used: make it anew (hobbit calibrate), or remove it", HobbitWarning, stacklevel=3)
    if found is not None and for_weights:
        params = replace(params, eviction_weights=found.eviction_weights)
    if not for_thresholds:
        return params, found
    quality = None if params.quality is None else parse_quality(params.quality)
    if found is not None:
        return _with_thresholds(params, quality or parse_quality(DEFAULT), found), found
    if quality is not None and not quality.paper:
        fingerprint(model)  # raises what a dense model is told, which no command gives low-precision copies
        raise ParameterError(_what_to_run(model, params) + why)
    return params, None


def _with_thresholds(params: OffloadParams, quality: Quality, found: Calibration) -> OffloadParams:
    if quality.paper:
        t1, t2 = found.thresholds
        return replace(params, t1=t1, t2=t2, quality=None)
    return params if quality.change is None else replace(params, quality=f"{100 * quality.change:.6g}%")


def _what_to_run(model: str, params: OffloadParams) -> str:
    run = f"`hobbit calibrate {model} --text FILE`"
    if low_types(model, params):
        return f"quality={params.quality!r} needs a calibration of the model: run {run} once"
    return (
        f"quality={params.quality!r} needs low-precision copies, which {model} does not have: run `hobbit convert {model} "
        f"--sidecar`, then {run}"
    )


class Feedback:
    """Holds a figure at a target, by moving along the frontier of the curve as the cache serves more or less.

    By scores alone, a point of the frontier would cost what the curve says. With the rule "miss" the cache spares a part
    of it. The share that is left is measured over some 64 tokens, 1 before the first: what comes next asks for target / share.

    Args:
        apply: sets T1, T2 from the next token on.
    """

    def __init__(self, curve: Curve, apply: Callable[[float, float], None]) -> None:
        self._curve, self._apply = curve, apply
        self._share = 1.0
        self._decodes = 0
        self._updates = 0
        self._last = Served()
        self._move()

    def _aim(self, share: float) -> Tuple[float, float]:
        """The point of the frontier to go to."""
        raise NotImplementedError

    def _cost(self, served: Served) -> Tuple[float, float]:
        """What these tokens cost, and what they would have cost by scores alone."""
        raise NotImplementedError

    def _move(self) -> None:
        self._at = self._aim(max(self._share, 1e-6))
        self._apply(*self._curve.thresholds(*self._at))

    def after_decode(self, counts: Callable[[], Served]) -> None:
        """After each llama_decode. `counts`: totals since any moment."""
        self._decodes += 1
        if self._decodes % _EVERY:
            return
        now, last = counts(), self._last
        self._last = now
        if now.tokens - last.tokens != _EVERY or now.n_bytes < last.n_bytes:
            return  # batches, which share what they read, or counts that were reset
        cost, asked = self._cost(now - last)
        if asked > 0:
            self._updates += 1
            self._share += max(_EVERY / _MEMORY, 1 / self._updates) * (cost / asked - self._share)
        self._move()


class BytesFeedback(Feedback):
    """Holds the bytes read a token.

    Args:
        cycle: bytes that a token asks for in exact mode.
        target: bytes that a token shall read.
    """

    def __init__(self, curve: Curve, cycle: int, target: float, apply: Callable[[float, float], None]) -> None:
        self._cycle, self._target = cycle, target
        super().__init__(curve, apply)

    def _aim(self, share: float) -> Tuple[float, float]:
        return self._curve.at_asked(self._target / share / self._cycle)

    def _cost(self, served: Served) -> Tuple[float, float]:
        return served.n_bytes, float(self._curve.asked(*self._at)) * self._cycle * served.tokens


class LossFeedback(Feedback):
    """Holds the loss.

    By second order, what selections lose together by low precision is in proportion to the sum of their (a g)^2
    (`curve.sensitivity_of`). So of what the point that is aimed at would lose by it, that share is lost which the cache left of
    this sum; of what it would lose by skipping, the share of the selections. But no less than the curve says for so many low and
    skipped ones, and no more than without a cache.

    Args:
        change: of perplexity, that is asked for (0.01: 1 %).
    """

    def __init__(self, curve: Curve, change: float, apply: Callable[[float, float], None]) -> None:
        self._target = math.log1p(change)
        super().__init__(curve, apply)

    def _aim(self, share: float) -> Tuple[float, float]:
        return self._curve.at_loss(self._target / share)

    def _cost(self, served: Served) -> Tuple[float, float]:
        asked_low, asked_skipped = self._at
        asked, asked_by_low = float(self._curve.loss(*self._at)), float(self._curve.loss(asked_low, 0.0))
        skipped = served.skipped / served.selections
        low = min(1.0, served.low / served.selections / (1 - skipped)) if skipped < 1 else 1.0
        lost = asked_by_low * (served.cost_low / served.cost_asked if served.cost_asked > 0 else 0.0)
        lost += (asked - asked_by_low) * (skipped / asked_skipped if asked_skipped > 0 else 0.0)
        return min(asked, max(lost, float(self._curve.loss(low, skipped)))), asked


def begin(session: Session, found: Calibration, params: OffloadParams) -> Optional[Feedback]:
    """Has a session that is started serve what `params.quality`, left by `resolve`, asks for.

    Returns:
        What has to be told of each llama_decode; None with the rule "weight", where the cache has no say.
    """
    curve = found.curve
    session.set_sensitivity(curve.sensitivity)
    quality = parse_quality(params.quality or DEFAULT)
    if quality.bytes_per_token is not None:
        return BytesFeedback(curve, session.info.bytes_cycle, quality.bytes_per_token, session.set_thresholds)
    if params.precision_rule == "miss":
        return LossFeedback(curve, quality.change or 0.0, session.set_thresholds)
    session.set_thresholds(*curve.thresholds(*curve.at_change(quality.change or 0.0)))
    return None
