"""The engine's cache, precision and prefetch rules over a trace of routing, without a model.

What runs is the engine's own code (csrc/engine, csrc/cache, csrc/policy) on a simulated disk, so that the counts are those
of a model that follows the trace. A row of the result is a policy at a cache size:

    lru, layer-lru, lfu   the textbook's caches, the yardsticks. With one precision (exact) each selection is an access of its
                          own, nothing of the running layer is protected, and LFU counts over the whole trace.
    hobbit                eq. 3 of HOBBIT; lcu: MoE-APEX; foresight: ours; layer-arc: ARC in each layer
    fate                  Fate's whole mode
    default               what `Llama(offload="hobbit")` uses when nothing else is said
    belady                the optimum, see below

All but the first three are asked as the engine asks: a layer's selections together (what is there is pinned before room is
made for the rest), uses counted from the beginning of each sequence. `accesses` and `uses` force one or the other for
every row. The cache keeps its contents from sequence to sequence, and begins empty.

The cache is one capacity: a share of all experts in high precision, in bytes. Low-precision copies take their part of it.

Figures of a row:

    hit_rate       selections that were there when they were asked for, cached or read ahead in time, of all selections
    miss_penalty   (loads_high + loads_low * bytes_low / bytes_high) / selections
    bytes          read, on demand and ahead
    gap_closed     of the bytes that LRU reads more than Belady's optimum, the share that this policy does not read: 0 as LRU,
                   1 as the optimum. None where the row follows another precision rule than LRU, and so another optimum.

With one precision `belady` is the optimum of whole experts. With two it is a lower bound on the bytes: the low copy is taken
for a part of the high one, and any byte may be kept without the others (csrc/replay/bound.h).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

from . import _lib
from ._memory import Size, human, parse_size
from ._session import c_routing
from .errors import ParameterError, from_c
from .params import EVICTION_RULES, OffloadParams
from .trace import Trace

# IQ4_NL beside Q8_0, as `hobbit convert` makes them: 18 and 34 bytes for 32 weights.
BYTES_HIGH = 8 << 20
LOW_OF_HIGH = 18 / 34

PRECISION_NAMES = ("exact", "miss", "weight", "drop", "demand")  # hobbit_precision_rule
_TEXTBOOK = ("lru", "layer-lru", "lfu")
_MODES = {"default": OffloadParams().mode, "fate": "fate"}
POLICIES = (*(name for name in EVICTION_RULES if name not in _MODES), *sorted(_MODES), "belady")


@dataclass(frozen=True)
class ReplaySettings:
    """What all rows have in common.

    Attributes:
        exact: one precision.
        precision_rule: otherwise "miss" or "weight"; see `OffloadParams`. `fate` has its own.
        prefetch: layers ahead that are read ahead by the trace's predictions, for every row; None: `default` and `fate` as
            their modes have it, if the trace has predictions, and the others not at all.
        accesses: "selection" or "layer" for every row; None: see above.
        uses: "trace" or "sequence" for every row: how long what is counted of the uses is kept; None: see above.
        token_ms: compute time of a token with all experts in memory.
        expert_share: of that, in the experts' products.
        bandwidth: of the disk, bytes per second; None: no clock, every read is done at once.
        latency: of a read, seconds.
        params: more of the offload's parameters, for every row; `io_threads` is the queue depth.
    """

    exact: bool = False
    precision_rule: str = "miss"
    prefetch: Optional[int] = None
    accesses: Optional[str] = None
    uses: Optional[str] = None
    token_ms: float = 0.0
    expert_share: float = 0.6
    bandwidth: Optional[float] = None
    latency: float = 100e-6
    params: OffloadParams = OffloadParams()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, known in (("accesses", ("selection", "layer")), ("uses", ("trace", "sequence"))):
            if getattr(self, name) not in (None, *known):
                raise ParameterError(f"{name} is {known[0]!r} or {known[1]!r}, not {getattr(self, name)!r}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ParameterError(f"a bandwidth of {self.bandwidth} bytes per second reads nothing")


@dataclass(frozen=True)
class ReplayRow:
    """A policy at a cache size; see the module. Times and `tokens_per_second` are None without a clock."""

    policy: str
    cache: float  # share of all experts in high precision
    cache_bytes: int
    precision: str
    accesses: str
    uses: str
    prefetch: int
    tokens: int
    selections: int
    hits_high: int
    hits_low: int
    loads_high: int
    loads_low: int
    skips: int
    hit_rate: float
    miss_penalty: float
    bytes: int
    bytes_per_token: float
    gap_closed: Optional[float] = None
    prefetches: int = 0
    prefetches_useful: int = 0
    prefetches_late: int = 0
    prefetches_wasted: int = 0
    bytes_prefetch: int = 0
    bytes_wasted: int = 0
    tokens_per_second: Optional[float] = None
    stall_share: Optional[float] = None


class Replay:
    """A trace, ready to be run with any policy at any size of cache.

    Args:
        bytes_high, bytes_low: of an expert; bytes_low 0: there are no low-precision copies, all is exact.
        model: a GGUF whose sizes are taken instead; its layers, experts and k must be those of the trace. No weights are read.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        bytes_high: int = BYTES_HIGH,
        bytes_low: Optional[int] = None,
        model: Union[str, os.PathLike[str], None] = None,
    ) -> None:
        self._ffi, self._lib = _lib.core()
        self._handle = self._ffi.NULL
        self.trace = trace
        c = self._new("hobbit_replay_model")
        c.n_expert = trace.n_experts
        c.bytes_high = bytes_high
        c.bytes_low = int(bytes_high * LOW_OF_HIGH) if bytes_low is None else bytes_low
        path = self._ffi.new("char[]", os.fsencode(model)) if model is not None else self._ffi.NULL
        c.path = path
        routing, keep = c_routing(self._ffi, trace)
        lens = self._ffi.new("uint32_t[]", [int(n) for n in trace.lens])
        error = self._ffi.new("hobbit_error *")
        handle = self._lib.hobbit_replay_init(c, routing, lens, len(trace.lens), error)
        del keep, path
        if handle == self._ffi.NULL:
            raise from_c(self._ffi, self._lib, error)
        self._handle = self._ffi.gc(handle, self._lib.hobbit_replay_free)
        sizes = self._ffi.new("uint64_t[2]")
        self._lib.hobbit_replay_sizes(self._handle, sizes)
        self.bytes_high, self.bytes_low = int(sizes[0]), int(sizes[1])

    def _new(self, name: str) -> Any:
        struct = self._ffi.new(f"{name} *")
        struct.struct_size = self._ffi.sizeof(name)
        return struct

    def run(self, policy: str, cache: float, settings: ReplaySettings, *, pool_bytes: int = 0) -> ReplayRow:
        """One row, `gap_closed` not filled in.

        Args:
            cache: share of all experts, 0 to 1.
            pool_bytes: instead of it, an expert pool as `Llama(expert_cache=...)` takes it.

        Raises:
            ParameterError: no such policy, or a parameter out of range.
            MemoryBudgetError: the cache is smaller than the smallest that works.
        """
        if policy not in POLICIES:
            raise ParameterError(f"there is no policy {policy!r}; there are: {', '.join(POLICIES)}")
        two = self.bytes_low > 0 and not settings.exact
        params = self._params(policy, settings)
        setup = self._new("hobbit_replay_setup")
        setup.cache_share, setup.pool_bytes = cache, pool_bytes
        setup.token_seconds, setup.expert_share = settings.token_ms / 1e3, settings.expert_share
        setup.bandwidth, setup.latency = settings.bandwidth or 0.0, settings.latency if settings.bandwidth else 0.0
        textbook = policy == "belady" or (policy in _TEXTBOOK and not two and not params.prefetch_depth)
        accesses = settings.accesses or ("selection" if textbook else "layer")
        uses = settings.uses or ("trace" if textbook else "sequence")
        if policy == "belady":
            result = self._call(self._lib.hobbit_replay_bound, params, setup)
            timed = None
        else:
            setup.by_selection, setup.keep_uses = accesses == "selection", uses == "trace"
            result = self._call(self._lib.hobbit_replay_run, params, setup)
            timed = result
            if setup.by_selection and settings.bandwidth:  # the clock is that of the engine, which asks for a layer at a time
                setup.by_selection = False
                timed = self._call(self._lib.hobbit_replay_run, params, setup)
        return self._row(policy, cache, settings, params, accesses, uses, result, timed)

    def _params(self, policy: str, settings: ReplaySettings) -> Any:
        mode = _MODES.get(policy, OffloadParams().mode)
        given = replace(settings.params, mode=mode, exact=settings.exact or self.bytes_low == 0)
        if policy not in _MODES:
            given = replace(given, eviction="lru" if policy == "belady" else policy, precision_rule=settings.precision_rule)
        elif policy == "default":
            given = replace(given, precision_rule=settings.precision_rule)
        c = self._new("hobbit_params")
        _lib.call(self._lib.hobbit_params_init, c, mode.encode())
        given.apply_to(c)
        if settings.prefetch is not None:
            c.prefetch_depth = settings.prefetch
        else:
            c.prefetch_depth = min(c.prefetch_depth, self.trace.depth) if policy in _MODES else 0
        if policy == "belady":
            c.prefetch_depth = 0
        if c.prefetch_depth > self.trace.depth:
            raise ParameterError(
                f"reading {c.prefetch_depth} layers ahead needs predictions as deep, the trace has {self.trace.depth or 'none'}: "
                f"record them (hobbit trace --predictions {c.prefetch_depth}) or make them up (--recall)"
            )
        return c

    def _call(self, function: Callable[..., int], params: Any, setup: Any) -> Any:
        result = self._new("hobbit_replay_result")
        _lib.call(function, self._handle, params, setup, result)
        return result

    def _row(
        self, policy: str, cache: float, settings: ReplaySettings, params: Any, accesses: str, uses: str, result: Any, timed: Any
    ) -> ReplayRow:
        t = result.stats.total
        tokens = int(result.stats.n_tokens)
        n_bytes = int(t.bytes_demand + t.bytes_prefetch)
        speed = stall = None
        if settings.bandwidth and timed is not None:
            speed = tokens / timed.seconds if timed.seconds else None
            stall = timed.stall_seconds / timed.seconds if timed.seconds else None
        elif settings.bandwidth:  # the roof: all computing hidden behind reading, or the other way round
            slowest = max(settings.token_ms / 1e3, n_bytes / tokens / settings.bandwidth)
            speed = 1 / slowest if slowest else None
        if policy == "belady":
            penalty = n_bytes / self.bytes_high
        else:
            penalty = t.loads_high + t.loads_low * self.bytes_low / self.bytes_high
        experts = self.trace.n_layers * self.trace.n_experts
        return ReplayRow(
            policy=policy,
            cache=cache,
            cache_bytes=int(cache * experts + 1e-6) * self.bytes_high,
            precision=PRECISION_NAMES[params.precision_rule],
            accesses=accesses,
            uses=uses,
            prefetch=int(params.prefetch_depth),
            tokens=tokens,
            selections=int(t.selections),
            hits_high=int(t.hits_high),
            hits_low=int(t.hits_low),
            loads_high=int(t.loads_high),
            loads_low=int(t.loads_low),
            skips=int(t.skips),
            hit_rate=(t.hits_high + t.hits_low - t.prefetches_late) / t.selections,
            miss_penalty=penalty / t.selections,
            bytes=n_bytes,
            bytes_per_token=n_bytes / tokens,
            prefetches=int(t.prefetches),
            prefetches_useful=int(t.prefetches_useful),
            prefetches_late=int(t.prefetches_late),
            prefetches_wasted=int(t.prefetches_wasted),
            bytes_prefetch=int(t.bytes_prefetch),
            bytes_wasted=int(t.bytes_wasted),
            tokens_per_second=speed,
            stall_share=stall,
        )

    def table(
        self,
        policies: Sequence[str],
        caches: Sequence[float],
        settings: Optional[ReplaySettings] = None,
        progress: Optional[Callable[[int, int], None]] = None,
    ) -> List[ReplayRow]:
        """All policies at all sizes, sizes outermost, with `gap_closed`, for which LRU and Belady are run in any case."""
        settings = settings or ReplaySettings()
        for policy in policies:
            if policy not in POLICIES:
                raise ParameterError(f"there is no policy {policy!r}; there are: {', '.join(POLICIES)}")
        names = list(dict.fromkeys([*policies, "lru", "belady"]))
        rows: List[ReplayRow] = []
        for cache in caches:
            at: Dict[str, ReplayRow] = {}
            for i, name in enumerate(names):
                at[name] = self.run(name, cache, settings)
                if progress is not None:
                    progress(len(names) * list(caches).index(cache) + i + 1, len(names) * len(caches))
            rows += [with_gap(at[name], at["lru"], at["belady"]) for name in policies]
        return rows


def with_gap(row: ReplayRow, lru: ReplayRow, belady: ReplayRow) -> ReplayRow:
    """The row with its share of the gap between LRU and the optimum."""
    gap = lru.bytes - belady.bytes
    if row.precision != lru.precision or gap <= 0:
        return row
    return replace(row, gap_closed=(lru.bytes - row.bytes) / gap)


def parse_cache(text: str) -> float:
    """ "25%" or "0.25" -> 0.25."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ParameterError(f"{text!r} is not a share of all experts: 25%, 0.25")
    return share


def parse_bytes(size: Size) -> int:
    """Bytes of an expert; "none" is 0."""
    return 0 if size == "none" else parse_size(size)


__all__ = ["POLICIES", "Replay", "ReplayRow", "ReplaySettings", "human", "parse_bytes", "parse_cache", "with_gap"]
