"""The file of a calibration: JSON beside the model, `model.calibration.json` for `model.gguf` and `model-00001-of-00003.gguf`.

It belongs to one model, by the fingerprint of its experts (csrc/io/fingerprint.h), and to the types of its low-precision copies.
Keys are those of `Calibration` and of `curve.Point`; `format` counts up when one changes its meaning.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

from .._handle import fingerprint
from .._sidecar import low_path
from .._split import base_name
from ..convert.ggtypes import load_types
from ..convert.plan import LOW_PREFIX, is_expert
from ..convert.source import Source
from ..errors import CalibrationError, ModelFileError
from ..params import OffloadParams
from .curve import Curve, Point, skipped_shares

FORMAT = 2

__all__ = ["FORMAT", "Calibration", "calibration_path", "load_for", "low_types"]


@dataclass(frozen=True)
class Calibration:
    """What `hobbit calibrate` found.

    Attributes:
        fingerprint: of the model's experts. low_types: number of low-precision tensors by type.
        curve: loss as a function of what is served low and skipped.
        thresholds: T1, T2 at the paper's quantiles of the model's scores, or the paper's own. thresholds_are: which.
        eviction_weights: w_lru, w_lfu, w_lhu, w_fld of eq. 3; None: those found were not better on the held-out part.
        eviction: how they were found: miss penalties by rule, "train" and "held_out", see `weights`.
        text: what was read: "name", "tokens", "window", and "perplexity" of exact mode.
        hobbit: version of the package.
    """

    fingerprint: str
    low_types: Dict[str, int]
    curve: Curve
    thresholds: Tuple[float, float]
    thresholds_are: str
    eviction_weights: Optional[Tuple[float, float, float, float]]
    eviction: Dict[str, Any] = field(default_factory=dict)
    text: Dict[str, Any] = field(default_factory=dict)
    hobbit: str = ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Union[str, os.PathLike[str]]) -> Calibration:
        """Reads and checks a file.

        Raises:
            CalibrationError: not a calibration, damaged, or of another format.
        """
        try:
            return _parse(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as e:
            raise CalibrationError(f"{path} cannot be read: {e.strerror or e}") from e
        except CalibrationError as e:
            raise CalibrationError(f"{path}: {e}") from e
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
            raise CalibrationError(f"{path} is not a calibration, or it is damaged ({type(e).__name__}: {e})") from e


def _parse(data: Any) -> Calibration:
    if not isinstance(data, dict) or "fingerprint" not in data:
        raise CalibrationError("this is not a calibration")
    if data.get("format") != FORMAT:
        raise CalibrationError(f"format {data.get('format')!r}, this version knows {FORMAT}: run hobbit calibrate again")
    c = data["curve"]
    curve = Curve(
        k=int(c["k"]),
        low_cost=_number(c["low_cost"]),
        sensitivity=_numbers(c["sensitivity"]),
        quantiles=tuple(_numbers(row) for row in c["quantiles"]),
        by_weight=_numbers(c["by_weight"]),
        points=tuple(_point(p) for p in c["points"]),
    )
    _check(curve)
    weights = data["eviction_weights"]
    t1, t2 = _numbers(data["thresholds"], 2)
    if not 0 <= t1 <= t2:
        raise CalibrationError("thresholds must satisfy 0 <= t1 <= t2")
    if weights is not None and abs(sum(_numbers(weights, 4)) - 1) > 1e-3:
        raise CalibrationError("eviction_weights do not sum to 1")
    return Calibration(
        fingerprint=str(data["fingerprint"]),
        low_types={str(k): int(v) for k, v in data["low_types"].items()},
        curve=curve,
        thresholds=(t1, t2),
        thresholds_are=str(data["thresholds_are"]),
        eviction_weights=None if weights is None else _numbers(weights, 4),  # type: ignore[arg-type]
        eviction=dict(data["eviction"]),
        text=dict(data["text"]),
        hobbit=str(data["hobbit"]),
    )


def _point(data: Dict[str, Any]) -> Point:
    high, low, skipped = _numbers(data["served"], 3)
    return Point(**{**{k: _number(v) for k, v in data.items() if k != "served"}, "served": (high, low, skipped)})  # type: ignore[arg-type]


def _check(curve: Curve) -> None:
    """That the curve can be used."""
    if curve.k < 1 or not curve.low_cost > 0:
        raise CalibrationError(f"k = {curve.k} and low_cost = {curve.low_cost} cannot be")
    if not curve.sensitivity or min(curve.sensitivity) < 0:
        raise CalibrationError("the sensitivity of a layer is below 0, or there is none")
    if len(curve.quantiles) != len(skipped_shares(curve.k)):
        raise CalibrationError("the quantiles are not those of the grid")
    for quantiles in (*curve.quantiles, curve.by_weight):
        if len(quantiles) < 2 or list(quantiles) != sorted(quantiles) or quantiles[0] < 0:
            raise CalibrationError("the quantiles of the scores do not rise")
    places = [(p.low, p.skipped) for p in curve.points] + [(0.0, 0.0)]
    lows, skips = {x for x, _ in places}, {x for _, x in places}
    if len(set(places)) != len(places) or len(places) != len(lows) * len(skips) or len(lows) < 2:
        raise CalibrationError("the points of the curve are no grid")
    if min(min(lows), min(skips), *(p.kl for p in curve.points)) < 0 or max(lows) > 1 or max(skips) > 1 - 1 / curve.k:
        raise CalibrationError("a point of the curve is out of range")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CalibrationError(f"{value!r} is not a number")
    return float(value)


def _numbers(values: Any, n: Optional[int] = None) -> Tuple[float, ...]:
    out = tuple(_number(v) for v in values)
    if n is not None and len(out) != n:
        raise CalibrationError(f"{len(out)} numbers where {n} are expected")
    return out


def calibration_path(model: Union[str, os.PathLike[str]]) -> Path:
    """The name that the calibration of a model has."""
    path = Path(model)
    return path.with_name(f"{base_name(path)}.calibration.json")


def low_types(model: str, params: OffloadParams) -> Dict[str, int]:
    """Number of low-precision expert tensors by type, in the model or in its sidecar."""
    with Source(Path(low_path(model, params.low_model) or model), load_types(), header_only=True) as source:
        names = [t.type.name for t in source.tensors if t.name.startswith(LOW_PREFIX) and is_expert(t.name, t.shape)]
    return {name: names.count(name) for name in sorted(set(names))}


def load_for(model: str, params: OffloadParams) -> Optional[Calibration]:
    """The calibration that `params.calibration` means for a model; None when there is none.

    Raises:
        CalibrationError: there is one, but it is damaged, or belongs to another model or other low-precision copies.
        ModelFileError: there is no file of the name that was given.
    """
    where = params.calibration
    if where is False or where == "none":
        return None
    path = calibration_path(model) if where is None or where is True else Path(where)
    if not path.exists():
        if where is None:
            return None
        raise ModelFileError(f"there is no file {path} (calibration)")
    found = Calibration.load(path)
    if found.fingerprint != fingerprint(model):
        raise CalibrationError(f"{path} belongs to another model than {model}")
    types = low_types(model, params)
    if found.low_types != types:
        was, now = ", ".join(found.low_types), ", ".join(types)
        raise CalibrationError(f"{path} is for low-precision copies in {was}; here are {'such in ' + now if now else 'none'}")
    return found
