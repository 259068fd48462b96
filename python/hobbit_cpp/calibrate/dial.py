"""`quality=`: what a user asks for, turned into thresholds by a calibration."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Callable, Optional, Tuple

from ..errors import CalibrationError, HobbitWarning, ParameterError
from ..params import OffloadParams
from .curve import Curve
from .quality import Quality, parse_quality
from .store import Calibration, load_for, low_types

DEFAULT = "1%"
"""Of offload="hobbit" for a model with a calibration."""

# Tokens between two looks at what was read, and over how many it is averaged.
_EVERY = 8
_MEMORY = 64


def resolve(model: str, params: OffloadParams) -> Tuple[OffloadParams, Optional[Calibration]]:
    """Parameters with what `quality` and the calibration say filled in, and the calibration, if there is one that is of use.

    A quality in bytes is left to `Feedback`.

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
        raise ParameterError(_what_to_run(model, params) + why)
    return params, None


def _with_thresholds(params: OffloadParams, quality: Quality, found: Calibration) -> OffloadParams:
    if quality.bytes_per_token is not None:
        return params
    if quality.change is not None:
        t1, t2 = found.curve.thresholds(*found.curve.at_change(quality.change))
    else:
        t1, t2 = found.thresholds
    return replace(params, t1=t1, t2=t2, quality=None)


def _what_to_run(model: str, params: OffloadParams) -> str:
    run = f"`hobbit calibrate {model} --text FILE`"
    if low_types(model, params):
        return f"quality={params.quality!r} needs a calibration of the model: run {run} once"
    return (
        f"quality={params.quality!r} needs low-precision copies, which {model} does not have: run `hobbit convert {model} "
        f"--sidecar --low Q4_0`, then {run}"
    )


class Feedback:
    """Holds the bytes read a token at a target, by moving along the frontier of the curve as the cache serves more or less.

    The bytes that a token reads are those it asks for (known for each point of the frontier) times a share that is measured,
    about that of the misses: 1 for a cold cache, then the mean over some 64 tokens. What comes next asks for target / share.

    Args:
        cycle: bytes that a token asks for in exact mode.
        target: bytes that a token shall read.
        apply: sets T1, T2 from the next token on.
    """

    def __init__(self, curve: Curve, cycle: int, target: float, apply: Callable[[float, float], None]) -> None:
        self._curve, self._cycle, self._target, self._apply = curve, cycle, target, apply
        self._read_share = 1.0
        self._decodes = 0
        self._last = (0, 0)
        self._move()

    def _move(self) -> None:
        self._at = self._curve.at_asked(self._target / max(self._read_share, 1e-6) / self._cycle)
        self._apply(*self._curve.thresholds(*self._at))

    def after_decode(self, counts: Callable[[], Tuple[int, int]]) -> None:
        """After each llama_decode. `counts`: tokens computed and bytes read since any moment."""
        self._decodes += 1
        if self._decodes % _EVERY:
            return
        (tokens, n_bytes), last = counts(), self._last
        self._last = (tokens, n_bytes)
        if tokens - last[0] != _EVERY or n_bytes < last[1]:
            return  # batches, which share what they read, or counts that were reset
        asked = float(self._curve.asked(*self._at)) * self._cycle * _EVERY
        self._read_share += _EVERY / _MEMORY * ((n_bytes - last[1]) / asked - self._read_share)
        self._move()
