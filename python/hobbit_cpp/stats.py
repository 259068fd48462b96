"""What the offload did: the numbers behind `Llama.offload_stats()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple


@dataclass(frozen=True)
class OffloadCounts:
    """Counted per selection, that is, per expert chosen for a token:

        selections == hits_high + hits_low + loads_high + loads_low + skips

    In a batch the first selection of an expert that had to be read is the load, the others are hits. A hit is late
    (`prefetches_late`) when a read ahead of it was not through yet. Router mass is the
    sum of router weights, normalised over each token's selection: `mass_total` is the number of (token, layer) pairs.
    `cost_asked`: sum of (a g)^2 (`calibrate.curve`) over what may be served low; `cost_low`: over what of it was.
    """

    selections: int = 0
    hits_high: int = 0
    hits_low: int = 0
    loads_high: int = 0
    loads_low: int = 0
    skips: int = 0
    mass_total: float = 0.0
    mass_low: float = 0.0
    mass_skipped: float = 0.0
    cost_asked: float = 0.0
    cost_low: float = 0.0
    prefetches: int = 0
    prefetches_useful: int = 0
    prefetches_late: int = 0
    prefetches_wasted: int = 0
    bytes_demand: int = 0
    bytes_prefetch: int = 0
    bytes_wasted: int = 0
    stall_seconds: float = 0.0
    expert_seconds: float = 0.0

    @property
    def bytes_read(self) -> int:
        """From disk, on demand and ahead."""
        return self.bytes_demand + self.bytes_prefetch

    @property
    def hit_rate(self) -> float:
        """Share of the selections that were there when they were asked for: in the cache, or read ahead in time."""
        return self._share(self.hits_high + self.hits_low - self.prefetches_late)

    @property
    def share_high(self) -> float:
        """Of the selections, served in high precision."""
        return self._share(self.hits_high + self.loads_high)

    @property
    def share_low(self) -> float:
        """Of the selections, served in low precision."""
        return self._share(self.hits_low + self.loads_low)

    @property
    def share_skipped(self) -> float:
        return self._share(self.skips)

    def _share(self, n: int) -> float:
        return n / self.selections if self.selections else 0.0


@dataclass(frozen=True)
class LayerCounts(OffloadCounts):
    """Counts of one MoE layer; `block` is N of blk.N."""

    block: int = 0


@dataclass(frozen=True)
class OffloadStats(OffloadCounts):
    """Totals since the model was loaded or the statistics were reset, and the counts of each MoE layer.

    Attributes:
        n_tokens: tokens computed, those of prompts too.
        eval_seconds: wall time in llama_decode; compute_seconds: the same less the stalls.
        peak_memory: the most this process ever held (not reset), in bytes.
        memory_budget: what `memory=` came to; pool_bytes: the expert pool in it.
        recall: share of the selections that were predicted 1, 2, ... layers ahead, of those predicted at all.
        direct_io: reads go past the page cache.
        prefetch_on: single tokens are decoded with prefetch at the moment; prefetch_ratio: time of a token with it over that
            without, in the last trial, None before the first. Above 1 it does not pay here, and is off until the next trial.
        pool_shrinks, pool_grows: steps in which the pool gave memory back because it was short, and took it again, since the
            model was loaded.
        warmed: experts that were read into the empty pool because earlier runs used them most; bytes_warmed: read for it, which
            is not in `bytes_read`.
        thresholds: T1, T2 in use; None: at the paper's quantiles of the scores seen so far, or no use for them.
    """

    n_tokens: int = 0
    eval_seconds: float = 0.0
    peak_memory: int = 0
    memory_budget: int = 0
    pool_bytes: int = 0
    slots_high: int = 0
    slots_low: int = 0
    resident_high: int = 0
    resident_low: int = 0
    recall: Dict[int, float] = field(default_factory=dict)
    direct_io: bool = True
    prefetch_on: bool = False
    prefetch_ratio: Optional[float] = None
    layers: List[LayerCounts] = field(default_factory=list)
    thresholds: Optional[Tuple[float, float]] = None
    warmed: int = 0
    bytes_warmed: int = 0
    pool_shrinks: int = 0
    pool_grows: int = 0

    @property
    def compute_seconds(self) -> float:
        return max(0.0, self.eval_seconds - self.stall_seconds)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / self.n_tokens if self.n_tokens else 0.0


@dataclass(frozen=True)
class Served:
    """Totals: tokens computed, bytes read; selections, those of them that were served low or skipped, and what the low ones cost,
    asked for and served (`OffloadCounts`)."""

    tokens: int = 0
    n_bytes: int = 0
    selections: int = 0
    low: int = 0
    skipped: int = 0
    cost_asked: float = 0.0
    cost_low: float = 0.0

    def __sub__(self, o: Served) -> Served:
        return Served(
            self.tokens - o.tokens,
            self.n_bytes - o.n_bytes,
            self.selections - o.selections,
            self.low - o.low,
            self.skipped - o.skipped,
            self.cost_asked - o.cost_asked,
            self.cost_low - o.cost_low,
        )
