"""The settings that are compared: a name for people, parameters for the engine, and what may be tuned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from ..errors import ParameterError
from ..params import OffloadParams

KINDS = {
    "exact": "every selected expert in high precision",
    "low": "HOBBIT: on a miss, low precision or a skip by the unimportance score",
    "weight": "low precision or a skip by scores alone, whatever is cached",
    "drop": "on a miss, a skip when the weight is below F/k; no low precision",
    "topk": "fewer experts a token",
}


@dataclass(frozen=True)
class Setting:
    """What one row of the table is about.

    Attributes:
        name: as it was asked for.
        kind: a key of `KINDS`.
        params: for the engine.
        tuned: its value is to be found, so that it reads as many MB a token as it should.
    """

    name: str
    kind: str
    params: OffloadParams
    tuned: bool = False

    @property
    def depends_on_cache(self) -> bool:
        """Whether what is computed depends on what happens to be cached: then tokens go one by one, as in use."""
        return not self.params.exact and self.params.precision_rule in ("miss", "drop")

    def with_value(self, value: float) -> Setting:
        """The same kind with the value that was found: F of "drop", the experts a token of "topk"."""
        if self.kind == "drop":
            if value <= 0:  # nothing is dropped
                return replace(self, params=replace(self.params, exact=True, precision_rule="miss", drop_fraction=None))
            return replace(self, params=replace(self.params, exact=False, precision_rule="drop", drop_fraction=value))
        return replace(self, params=replace(self.params, exact=True, max_experts=int(value)))


def exact_setting(base: OffloadParams) -> Setting:
    """The reference: everything as in `base`, but in high precision."""
    params = replace(
        base, exact=True, quality=None, precision_rule="miss", drop_fraction=None, max_experts=None, t1=None, t2=None
    )
    return Setting("exact", "exact", params)


def kind_of(params: OffloadParams) -> str:
    """The key of `KINDS` that fits parameters."""
    if params.max_experts is not None:
        return "topk"
    if params.exact or (params.mode == "lru" and params.precision_rule == "miss"):
        return "exact"
    return {"miss": "low", "weight": "weight", "drop": "drop"}[params.precision_rule]


def parse_setting(text: str, base: OffloadParams) -> Setting:
    """ "exact", "low", "low=T1:T2", "weight", "weight=T1:T2", "drop", "drop=F", "topk" or "topk=K".

    "drop" and "topk" without a value are tuned. `base`: mode and cache that all share.

    Raises:
        ParameterError: none of these, with what there is.
    """
    kind, _, value = text.partition("=")
    exact = exact_setting(base)
    try:
        if kind == "exact" and not value:
            return exact
        if kind in ("low", "weight"):
            t1, t2 = _thresholds(value)
            rule = "miss" if kind == "low" else "weight"
            mode = "hobbit" if base.mode == "lru" else base.mode
            quality = base.quality if t1 is None else None
            params = replace(exact.params, mode=mode, exact=False, precision_rule=rule, t1=t1, t2=t2, quality=quality)
            return Setting(text, kind, params)
        if kind in ("drop", "topk"):
            setting = Setting(text, kind, exact.params, tuned=not value)
            return setting.with_value(_positive(value, whole=kind == "topk")) if value else setting
    except ValueError as e:
        raise ParameterError(f"'{text}': {e}") from None
    raise ParameterError(f"there is no setting '{text}': {', '.join(KINDS)}; low=T1:T2, weight=T1:T2, drop=F, topk=K")


def _thresholds(value: str) -> tuple[Optional[float], Optional[float]]:
    if not value:
        return None, None
    t1, colon, t2 = value.partition(":")
    if not colon:
        raise ValueError("two thresholds are needed, like low=0.6:0.9")
    return float(t1), float(t2)


def _positive(value: str, whole: bool) -> float:
    number = int(value) if whole else float(value)
    if not number > 0:
        raise ValueError("the value must be more than 0")
    return number
