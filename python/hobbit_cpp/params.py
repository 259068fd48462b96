"""What can be set about the offload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, Optional, Tuple, Union

from ._memory import Size
from ._sidecar import LowModel
from .calibrate.quality import CalibrationFile, parse_quality
from .errors import ParameterError

PRECISION_RULES = {"exact": 0, "miss": 1, "weight": 2, "drop": 3}
EVICTION_RULES = {"lru": 0, "lfu": 1, "hobbit": 2, "lcu": 3, "foresight": 4, "layer-lru": 5, "layer-arc": 6, "fate": 7}


@dataclass(frozen=True)
class OffloadParams:
    """Parameters of the offload; None means the mode's default.

    Attributes:
        mode: "hobbit" (HOBBIT's mixed precision and prefetch, our cache), "fate" (on demand low, ahead high, a cache that
            favours the first layers) or "lru" (load on demand: the baseline).
        exact: only high precision: the logits of stock llama.cpp, bit for bit.
        precision_rule: "miss" (HOBBIT: an expert of little weight that is not cached is read in low precision or skipped)
            or "weight" (by scores alone, whatever is cached: lossy, but the same text for the same prompt),
            or "drop" (an expert that is not cached is skipped when its share of the token's router weight is below
            drop_fraction / k; nothing is served in low precision, so an ordinary file will do).
        drop_fraction: F of the rule "drop", more than 0; it needs that rule.
        max_experts: most experts a token, those of the largest router weights, by any rule and in exact mode; None: all.
        t1, t2: thresholds on the unimportance score s in [0, 1] (HOBBIT eq. 2): s <= t1 high, s <= t2 low, else skip.
            None: what `quality` comes to.
        quality: how much may be lost: "exact"; "1%": perplexity at most 1 % above that of exact mode, by the model's calibration
            (`hobbit calibrate`); "40MB/token": as little loss as reading so much a token allows, by the same; "paper": thresholds
            at the paper's quantiles (67 % high, 30 % low, 3 % skipped) of the model's own scores. None: "1.5%" for a model with a
            calibration, "paper" for others.
        calibration: the file of `hobbit calibrate`; None: `model.calibration.json` beside `model.gguf` if it is there; False or
            "none": none.
        renormalize: scale up the surviving router weights of a token after a skip.
        eviction: "lru", "lfu", "hobbit" (eq. 3), "lcu" (MoE-APEX) or "foresight" (expected uses, from what followed similar
            tokens, and the order of LRU where that hits more: the default of "hobbit"); with slots of its own for each layer
            "layer-lru", "layer-arc", or "fate" (ARC; the first four layers are held whole).
        eviction_weights: w_lru, w_lfu, w_lhu, w_fld of eq. 3; they sum to 1. None: those of the calibration, or even ones.
        prefetch_depth: layers ahead that are predicted, 0 to 4; 0 turns prefetch off.
        prefetch_reads: most prefetch reads in flight.
        prefill_low: in prompts, the least popular experts of a batch, up to this share of its selections, are read in low
            precision on a miss (Fate uses 0.25 to 0.3); None: the mode's, 0 for "hobbit". Not in exact mode.
        prefetch_always: read ahead for single tokens even where trials at run time say that it does not pay.
        prefetch_extra: experts read ahead in a layer beyond the k that are predicted.
        norm_correction: rescale the router input by w_norm[l+d] / w_norm[l] before predicting.
        gate_correction: learn, while the model runs, what those predictions miss: the routers' answers are regressed on the
            predicted logits and those of the router before. None: the mode's, on for "hobbit", off for "fate".
        expert_cache: the expert pool in bytes or as text; None: what `memory` leaves.
        low_share: share of the pool for low-precision copies, 0 to 0.9. Default: it follows demand.
        io_threads: reader threads, that is, the queue depth.
        io_block: bytes of a prefetch read between two looks at the abort flag.
        direct_io: read past the page cache where the file system can.
        low_model: the low-precision copies in a file of their own (`hobbit convert --sidecar`): its path; None: `model.low.gguf`
            beside `model.gguf` if it is there; False or "none": none.
        embeddings_on_disk: token embeddings, of which a token needs one row of some hundred thousand, are read by rows. Default:
            where the budget has no room for everything, and the file has an output matrix beside them.
        heat: keep between runs how often each expert is used, and begin by reading those that were used most. Only with eviction
            "foresight". Never a reason to fail: see `_heat`.
        yield_memory: while the machine or the cgroup is short of memory the expert pool gives some back: see `_pressure`.
    """

    mode: str = "hobbit"
    exact: bool = False
    precision_rule: str = "miss"
    t1: Optional[float] = None
    t2: Optional[float] = None
    renormalize: bool = True
    drop_fraction: Optional[float] = None
    max_experts: Optional[int] = None
    eviction: Optional[str] = None
    eviction_weights: Optional[Tuple[float, float, float, float]] = None
    prefetch_depth: Optional[int] = None
    prefetch_reads: Optional[int] = None
    prefetch_extra: Optional[int] = None
    prefetch_always: Optional[bool] = None
    prefill_low: Optional[float] = None
    norm_correction: bool = True
    gate_correction: Optional[bool] = None
    expert_cache: Optional[Size] = None
    low_share: Optional[float] = None
    io_threads: Optional[int] = None
    io_block: Optional[int] = None
    direct_io: bool = True
    low_model: LowModel = None
    quality: Optional[str] = None
    calibration: CalibrationFile = None
    embeddings_on_disk: Optional[bool] = None
    heat: bool = True
    yield_memory: bool = True

    def __post_init__(self) -> None:
        self._check_quality()
        if self.precision_rule not in ("miss", "weight", "drop"):
            raise ParameterError(f"precision_rule must be 'miss', 'weight' or 'drop', not {self.precision_rule!r}")
        if (self.precision_rule == "drop") != (self.drop_fraction is not None):
            raise ParameterError("precision_rule='drop' and drop_fraction are given together or not at all")
        if self.drop_fraction is not None and not 0 < self.drop_fraction < 1e4:
            raise ParameterError(f"drop_fraction must be more than 0 and below 10000, not {self.drop_fraction}")
        if self.max_experts is not None and self.max_experts < 1:
            raise ParameterError(f"max_experts must be at least 1, not {self.max_experts}")
        if self.eviction is not None and self.eviction not in EVICTION_RULES:
            raise ParameterError(f"eviction must be one of {', '.join(EVICTION_RULES)}, not {self.eviction!r}")
        if (self.t1 is None) != (self.t2 is None):
            raise ParameterError("t1 and t2 are given together or not at all")
        if self.t1 is not None and self.t2 is not None and not 0 <= self.t1 <= self.t2:
            raise ParameterError(f"thresholds must satisfy 0 <= t1 <= t2, not {self.t1}, {self.t2}")
        if self.eviction_weights is not None and len(self.eviction_weights) != 4:
            raise ParameterError("eviction_weights are four: w_lru, w_lfu, w_lhu, w_fld")

    def _check_quality(self) -> None:
        """Also turns "exact" into `exact`."""
        if self.quality is None:
            return
        quality = parse_quality(self.quality)
        if quality.exact:
            object.__setattr__(self, "exact", True)
            object.__setattr__(self, "quality", None)
            return
        given = {"exact": self.exact, "t1 and t2": self.t1 is not None, "precision_rule='drop'": self.precision_rule == "drop"}
        given[f"mode {self.mode!r}"] = self.mode != "hobbit"
        given["precision_rule='weight'"] = self.precision_rule == "weight" and quality.bytes_per_token is not None
        clash = [name for name, is_set in given.items() if is_set]
        if clash:
            raise ParameterError(f"quality={self.quality!r} does not go with {', '.join(clash)}: leave one out")

    @classmethod
    def of(
        cls,
        offload: Union[str, OffloadParams],
        *,
        exact: Optional[bool] = None,
        precision_rule: Optional[str] = None,
        expert_cache: Optional[Size] = None,
        low_model: LowModel = None,
        quality: Optional[str] = None,
        calibration: CalibrationFile = None,
    ) -> OffloadParams:
        """From what `Llama(offload=...)` takes; the other arguments override."""
        if isinstance(offload, cls):
            params = offload
        elif isinstance(offload, str):
            params = cls(mode=offload)
        else:
            raise ParameterError(f"offload is 'hobbit', 'fate', 'lru', None or OffloadParams, not {offload!r}")
        given: Dict[str, Any] = {"exact": exact, "precision_rule": precision_rule, "expert_cache": expert_cache}
        given.update(low_model=low_model, quality=quality, calibration=calibration)
        return replace(params, **{name: value for name, value in given.items() if value is not None})

    def apply_to(self, c: Any) -> None:
        """Writes what is set over the mode's defaults in a `hobbit_params`."""
        if self.exact:
            c.precision_rule = PRECISION_RULES["exact"]
        elif self.precision_rule != "miss":
            c.precision_rule = PRECISION_RULES[self.precision_rule]
        if self.eviction is not None:
            c.eviction_rule = EVICTION_RULES[self.eviction]
        if self.t1 is not None and self.t2 is not None:
            c.t1, c.t2 = self.t1, self.t2
        c.renormalize = self.renormalize
        if self.eviction_weights is not None:
            c.w_lru, c.w_lfu, c.w_lhu, c.w_fld = self.eviction_weights
        c.norm_correction = self.norm_correction
        c.direct_io = self.direct_io
        optional = ("drop_fraction", "max_experts", "prefill_low", "low_share", "io_threads", "io_block")
        for name in (*optional, "prefetch_depth", "prefetch_reads", "prefetch_extra"):
            value = getattr(self, name)
            if value is not None:
                try:
                    setattr(c, name, value)
                except (OverflowError, TypeError) as e:
                    raise ParameterError(f"{name}={value!r} is out of range") from e
        c.fixed_split = self.low_share is not None
        if self.prefetch_always is not None:
            c.prefetch_always = self.prefetch_always
        if self.gate_correction is not None:
            c.gate_correction = self.gate_correction
