"""How fast a model will be with so much memory, before it is loaded.

A token takes at least what the cores need for its products, and at least what the disk needs for the experts that are
missing. The engine reads while it multiplies what is there, but a layer's reads begin only when its router has spoken,
so that the dense part
comes on top:

    t = t_dense + max(t_experts, t_disk + t_experts / k)

(the expert that arrives last is still to be multiplied). Where predictions are read ahead, some of t_disk lies under the
products of the layer before, but more is read; where that does not gain, the engine leaves it off. The band is from
everything overlapped, with the best of the traces that the statistics are from, to nothing overlapped, with the worst.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from hobbit_cpp import probe
from hobbit_cpp.calibrate.curve import Curve
from hobbit_cpp.calibrate.dial import DEFAULT
from hobbit_cpp.calibrate.quality import parse_quality
from hobbit_cpp.probe import DiskProbe

from .routing import Loads, expected_loads
from .sizes import Product, Sizes, Weights

__all__ = ["Compute", "Forecast", "Machine", "forecast", "measure_machine"]

IO_THREADS = 8
"""The engine's default queue depth."""

CONVERSATION = 1024
"""Tokens of an ordinary conversation: what a plan is for when nobody says."""

_F32 = 0
# Nodes of a layer's graph that are no large products: norms, rope, softmax, additions, views that cost nothing are not
# counted.
_NODES_A_LAYER = 30
_NODE = (_F32, 64, 64)
# Figures when nothing can be measured: an ordinary SATA SSD, and one channel of memory.
_ASSUMED_DISK, _ASSUMED_RATE = 500e6, 8e9
# Prefetched and not used, of all that is read: predictions of the next layer are right about nine times in ten.
_WASTE = 0.05
# Of what is missing, read ahead; and how much of a token's computing that is read under, at most: measured on two cores, which
# the reads disturb.
_AHEAD, _UNDER = 0.8, 0.25
_DISK_SPREAD = 0.15
_LOW_COST = 0.55


@dataclass(frozen=True)
class Compute:
    """Seconds of a token with all weights in memory."""

    dense: float
    experts: float
    source: str
    """"measured" (every expert in memory, by `hobbit bench`) or "estimated" (from products of these types)."""

    @property
    def total(self) -> float:
        """The floor under every token."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Machine:
    """What this machine gives to this model."""

    disk: Optional[DiskProbe]
    low_disk: Optional[DiskProbe]
    compute: Compute
    threads: int

    @property
    def bandwidth(self) -> float:
        """The most the disk gives at this model's expert size, bytes a second."""
        return self.disk.best if self.disk is not None else _ASSUMED_DISK


@dataclass(frozen=True)
class Forecast:
    """What is expected of one setting.

    Attributes:
        mode: "lru", "exact" or "hobbit".
        share: of the experts that are in memory once the cache is full.
        mb_token: read from disk for a token; peak: the most memory that the process will hold, in bytes.
        tok_s, tok_s_low, tok_s_high: the estimate and its band.
        prompt_s: reading a prompt of one full batch: about every expert is needed once.
    """

    mode: str
    budget: int
    pool: int
    share: float
    loads: Loads
    hit_rate: float
    mb_token: float
    tok_s: float
    tok_s_low: float
    tok_s_high: float
    compute_ms: float
    disk_ms: float
    prompt_s: float
    peak: int


def measure_machine(model: Path, sizes: Sizes, weights: Weights, threads: int, fresh: bool = False) -> Machine:
    """Probes, or what is kept of them."""
    disk = probe.probe_disk(model, fresh=fresh)
    low = probe.probe_disk(model, low=True, fresh=fresh) if sizes.info.has_low else None
    return Machine(disk, low, _compute(model, weights, threads, fresh), threads)


def _compute(model: Path, weights: Weights, threads: int, fresh: bool) -> Compute:
    dense = sum(_seconds(p, threads, fresh) for p in weights.dense)
    experts = sum(_seconds(p, threads, fresh) for p in weights.experts)
    rate = probe.probe_compute(*_NODE, threads, fresh=fresh)
    if rate is not None:
        dense += weights.n_layer * _NODES_A_LAYER * (4 * _NODE[1] * _NODE[2]) / rate
    floor = None if fresh else probe.recall_floor(model, threads)
    if floor is None:
        return Compute(dense, experts, "estimated")
    scale = floor / (dense + experts)
    return Compute(dense * scale, experts * scale, "measured")


def _seconds(product: Product, threads: int, fresh: bool) -> float:
    rate = probe.probe_compute(product.type_id, product.n_in, product.n_out, threads, fresh=fresh)
    return product.bytes / (rate or _ASSUMED_RATE)


def forecast(
    sizes: Sizes,
    weights: Weights,
    machine: Machine,
    budget: int,
    mode: str,
    n_tokens: Optional[int] = CONVERSATION,
    has_low: Optional[bool] = None,
    *,
    after: int = 0,
    predicts: bool = True,
) -> Forecast:
    """What a budget gives.

    Args:
        mode: "lru", "exact" or "hobbit".
        n_tokens: of a run from an empty cache; None: the long run. `after`: so many tokens of it that do not count.
        has_low: as if there were low copies.
        predicts: routers are asked ahead; those of random weights know nothing.
    """
    info = sizes.info
    with_low = info.has_low if has_low is None else has_low
    rule = "exact" if mode == "hobbit" and not with_low else mode
    pool = sizes.pool(budget)
    share = min(1.0, max(0, pool - sizes.streaming) / info.slot_high / max(sizes.n_experts, 1))
    low_cost = info.bytes_expert_low / info.bytes_expert_high if info.has_low else _LOW_COST
    options = expected_loads(info.n_expert, info.n_expert_used, share, rule, n_tokens, weights.random, after)
    if rule == "hobbit" and weights.curve is not None:
        options = [_by_the_dial(loads, weights.curve) for loads in options]
    if share >= 1.0 and n_tokens is None:
        options = [Loads(0.0, 0.0, 0.0)]
    cycle = float(info.bytes_cycle)
    expected, best, worst = (read.bytes(low_cost) * cycle for read in _spread(options, low_cost))
    bandwidth = _bandwidth(sizes, machine, options[0])
    compute = machine.compute
    disk = expected / bandwidth
    t = _token(compute, disk, info.n_expert_used)
    if mode != "lru" and predicts and not weights.random:
        hidden = min(_AHEAD * disk, _UNDER * compute.total)
        ahead = max(compute.total, _token(compute, disk * (1 + _WASTE), info.n_expert_used) - hidden)
        if ahead < t:
            t, expected, disk = ahead, expected * (1 + _WASTE), disk * (1 + _WASTE)
    quick = max(compute.total, best / machine.bandwidth * (1 - _DISK_SPREAD))
    slow = compute.total + worst / bandwidth * (1 + _DISK_SPREAD)
    to_read = max(0.0, info.bytes_high * (1 - share))
    return Forecast(
        mode=mode,
        budget=budget,
        pool=pool,
        share=share,
        loads=options[0],
        hit_rate=options[0].hit_rate,
        mb_token=expected / 1e6,
        tok_s=1 / t,
        tok_s_low=1 / max(slow, t),
        tok_s_high=1 / min(quick, t),
        compute_ms=machine.compute.total * 1e3,
        disk_ms=disk * 1e3,
        prompt_s=to_read / machine.bandwidth,
        peak=sizes.peak(budget),
    )


def _by_the_dial(loads: Loads, curve: Curve) -> Loads:
    """The same misses at the default quality: what the cache spares, low precision may cost (`dial.LossFeedback`)."""
    missing = loads.high + loads.low + loads.skip
    loss = math.log1p(parse_quality(DEFAULT).change or 0.0)
    asked = curve.shares(*curve.at_loss(loss / max(missing, 0.01)))
    return Loads(*(missing * float(share) for share in asked))


def _spread(options: List[Loads], low_cost: float) -> Tuple[Loads, Loads, Loads]:
    """What is expected, and the options that read least and most."""
    by_bytes = sorted(options, key=lambda loads: loads.bytes(low_cost))
    return options[0], by_bytes[0], by_bytes[-1]


def _token(compute: Compute, disk: float, k: int) -> float:
    """Seconds, when nothing is read ahead. `disk`: those that it reads."""
    return compute.dense + max(compute.experts, disk + compute.experts / k if disk else 0.0)


def _bandwidth(sizes: Sizes, machine: Machine, loads: Loads) -> float:
    """Bytes a second at the depth that a layer's misses make."""
    if machine.disk is None:
        return _ASSUMED_DISK
    info = sizes.info
    parts = max(1.0, info.bytes_expert_high / max(machine.disk.read_bytes, 1))
    depth = min(float(IO_THREADS), max(1.0, (loads.high + loads.low) * info.n_expert_used * parts))
    rate = machine.disk.at(depth)
    if machine.low_disk is not None and loads.low > 0:
        # mixed sizes: by the bytes of each
        low_cost = info.bytes_expert_low / info.bytes_expert_high
        low = loads.low * low_cost / max(loads.bytes(low_cost), 1e-9)
        rate = 1 / ((1 - low) / rate + low / machine.low_disk.at(depth))
    return rate


def budgets_to_show(sizes: Sizes, given: int) -> List[Tuple[int, bool]]:
    """Budgets for a table, (bytes, is it the given one): from the smallest that works to where more does not help."""
    steps = {int(sizes.smallest + (sizes.largest - sizes.smallest) * part) for part in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)}
    rows = {(budget, False) for budget in steps if abs(budget - given) > 0.04 * given}
    if given >= sizes.smallest:
        rows.add((given, True))
    return sorted(rows)
