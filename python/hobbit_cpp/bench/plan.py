"""`hobbit plan`: what goes where, how fast it will be, which settings and why, what more memory would buy."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from hobbit_cpp import _memory, probe
from hobbit_cpp._batches import COMMON
from hobbit_cpp._memory import cores, human

from .forecast import Forecast, Machine, budgets_to_show, forecast, measure_machine
from .sizes import Sizes, Weights, measure_sizes, read_weights

__all__ = ["FORMAT", "Plan", "make_plan", "to_json"]

FORMAT = 1
_GAIN = 1.1


@dataclass(frozen=True)
class Choice:
    """A setting and the reason for it."""

    setting: str
    value: str
    why: str


@dataclass(frozen=True)
class Plan:
    """All that is known before a model is loaded.

    Attributes:
        fits: the budget is large enough, and the machine has as much.
        problem: why not, and what to do; empty when it fits.
        modes: forecasts at the budget: `chosen` is the first.
        table: forecasts of the chosen mode over budgets.
    """

    model: Path
    budget: int
    free: int
    sizes: Sizes
    weights: Weights
    machine: Machine
    fits: bool
    problem: str
    modes: List[Forecast]
    table: List[Forecast]
    choices: List[Choice]
    command: str
    notes: List[str]


def make_plan(
    model: Path, memory: Optional[_memory.Size], n_ctx: int, n_batch: int, n_ubatch: int, threads: int, fresh: bool = False
) -> Plan:
    """Plans one context size. `memory` as of `Llama`; None: what would be taken by default."""
    budget = _memory.default_budget() if memory is None else _memory.parse_size(memory, of=_memory.total())
    sizes = measure_sizes(model, n_ctx, n_batch, n_ubatch, threads)
    weights = read_weights(model, sizes.info.n_expert_used)
    machine = measure_machine(model, sizes, weights, threads, fresh)
    free = sizes.process + _memory.available()  # without what measuring has left in this process
    problem = ""
    if budget < sizes.smallest:
        problem = f"{human(budget)} is too small: the smallest that works is {human(sizes.smallest)}"
        if sizes.kv > 0.2 * sizes.smallest:
            problem += f" ({human(sizes.kv)} of it is the KV cache of {sizes.n_ctx} tokens: a smaller context helps)"
    elif budget > free and sizes.held + sizes.pool(budget) > free:
        problem = f"{human(budget)} is more than is free on this machine now ({human(free)})"
    at = max(min(budget, max(sizes.largest, free)), sizes.smallest)
    mode, reason = _mode(sizes, weights, machine, at)
    others = [m for m in ("hobbit", "exact", "lru") if m != mode and (m != "hobbit" or sizes.info.has_low)]
    modes = [forecast(sizes, weights, machine, at, m) for m in (mode, *others)]
    table = [forecast(sizes, weights, machine, b, mode) for b, _ in budgets_to_show(sizes, at)]
    choices = [Choice("offload", mode, reason), *_choices(sizes, machine, modes[0], threads)]
    return Plan(
        model=model,
        budget=budget,
        free=free,
        sizes=sizes,
        weights=weights,
        machine=machine,
        fits=not problem,
        problem=problem,
        modes=modes,
        table=table,
        choices=choices,
        command=_command(model, at, sizes.n_ctx, (n_batch, n_ubatch), threads, mode),
        notes=_notes(sizes, weights, machine, modes[0], budget),
    )


def _mode(sizes: Sizes, weights: Weights, machine: Machine, budget: int) -> Tuple[str, str]:
    if budget >= sizes.largest:
        return "exact", "every expert fits into memory: nothing has to be given up"
    if not sizes.info.has_low:
        return "exact", "the file has no low-precision copies"
    lossy = forecast(sizes, weights, machine, budget, "hobbit")
    exact = forecast(sizes, weights, machine, budget, "exact")
    if lossy.tok_s < _GAIN * exact.tok_s:
        return "exact", f"low precision would gain only {lossy.tok_s / exact.tok_s - 1:.0%} here"
    return "hobbit", (
        f"low copies make it {lossy.tok_s / exact.tok_s:.2f} times as fast as exact ({exact.tok_s:.1f} tokens/s); "
        f"about {lossy.loads.low:.0%} of the selections are then read in low precision, {lossy.loads.skip:.1%} skipped"
    )


def _choices(sizes: Sizes, machine: Machine, chosen: Forecast, threads: int) -> List[Choice]:
    out = [Choice("threads", str(threads), "one for each core" if threads == cores() else "as asked")]
    disk = machine.disk
    if disk is not None:
        deep, usual = disk.at(16), disk.at(8)
        if deep > _GAIN * usual:
            out.append(Choice("io_threads", "16", f"the disk gives {deep / usual - 1:.0%} more than at the default of 8"))
        else:
            out.append(Choice("io_threads", "8", f"the disk gives no more at a greater depth ({usual / 1e9:.2f} GB/s)"))
    if chosen.disk_ms > 3 * chosen.compute_ms:
        out.append(Choice("prefetch_depth", "1", "the disk is the limit: reading further ahead would take from it"))
    return out


def _command(model: Path, budget: int, n_ctx: int, batch: Tuple[int, int], threads: int, mode: str) -> str:
    flags = {"exact": " --exact", "lru": " --offload lru"}.get(mode, "")
    if batch != (COMMON, COMMON):
        flags += f" -b {batch[0]} -ub {batch[1]}"
    where = f"--memory {-(-budget // (1 << 20))}MiB -c {n_ctx} -t {threads}"
    return f"hobbit run {shlex.quote(str(model))} {where}{flags}"


def _notes(sizes: Sizes, weights: Weights, machine: Machine, chosen: Forecast, budget: int) -> List[str]:
    info = sizes.info
    notes = []
    if budget > sizes.largest:
        notes.append(f"from {human(sizes.largest)} on every expert is in memory: {human(budget)} bring no more")
    if weights.random:
        notes.append("the weights are random: no expert is preferred, and the hit rate is the share that is cached")
    if not info.has_low and chosen.share < 1:
        lossy = forecast(sizes, weights, machine, chosen.budget, "hobbit", has_low=True)
        if lossy.tok_s > _GAIN * chosen.tok_s:
            notes.append(f"with low-precision copies of half the size (hobbit convert) about {lossy.tok_s:.1f} tokens/s")
    if chosen.share * info.n_expert < info.n_expert_used:
        notes.append("the cache holds less than one token uses: most experts are read for every token")
    if machine.disk is None:
        notes.append("the disk could not be measured: 0.5 GB/s is assumed")
    elif not machine.disk.direct:
        notes.append("this file system has no direct I/O: reads go through the page cache")
    if probe.is_busy():
        notes.append("other programs hold the cores now: what was probed is less than this machine gives; it is not kept")
    if machine.compute.source == "estimated":
        notes.append("the compute time is estimated; hobbit bench measures it and plans remember")
    return notes


def to_json(plan: Plan) -> Dict[str, Any]:
    """Stable keys; sizes in bytes, times in the unit of the name.

    format, model, name, budget, free, fits, problem, smallest, largest
    prompt: lent to the largest batch while it is computed; embeddings: that stay on disk
    memory: process, dense, kv, buffers, pool, spare (sum: the budget); n_ctx
    experts: layers, per_layer, used, bytes_high, bytes_low, share_resident
    disk: read_bytes, bandwidth (bytes/s by queue depth), direct; or null
    compute: ms (a token with everything in memory), source
    forecasts: of each mode at the budget, the chosen first; table: of the chosen mode over budgets. Each: mode, budget,
    pool, share,
        hit_rate, load_high, load_low, skip (shares of the selections), mb_token, tok_s, tok_s_low, tok_s_high,
        compute_ms, disk_ms, prompt_s, peak
    choices: setting, value, why; command; notes
    """
    sizes, info, chosen = plan.sizes, plan.sizes.info, plan.modes[0]
    pool = max(chosen.pool, 0)
    disk = plan.machine.disk
    return {
        "format": FORMAT,
        "model": str(plan.model),
        "name": plan.weights.name,
        "budget": plan.budget,
        "free": plan.free,
        "fits": plan.fits,
        "problem": plan.problem,
        "smallest": sizes.smallest,
        "largest": sizes.largest,
        "memory": {
            "process": sizes.process,
            "dense": sizes.dense,
            "kv": sizes.kv,
            "buffers": sizes.buffers,
            "pool": pool,
            "spare": chosen.budget - sizes.held - pool,
            "n_ctx": sizes.n_ctx,
        },
        "prompt": sizes.longest,
        "embeddings": sizes.embeddings,
        "experts": {
            "layers": info.n_moe_layer,
            "per_layer": info.n_expert,
            "used": info.n_expert_used,
            "bytes_high": info.bytes_high,
            "bytes_low": info.bytes_low,
            "share_resident": chosen.share,
        },
        "disk": None if disk is None else {"read_bytes": disk.read_bytes, "bandwidth": disk.bandwidth, "direct": disk.direct},
        "compute": {"ms": plan.machine.compute.total * 1e3, "source": plan.machine.compute.source},
        "forecasts": [forecast_json(f) for f in plan.modes],
        "table": [forecast_json(f) for f in plan.table],
        "choices": [dataclasses.asdict(c) for c in plan.choices],
        "command": plan.command,
        "notes": plan.notes,
    }


def forecast_json(f: Forecast) -> Dict[str, Any]:
    """A forecast, flat."""
    out = {**dataclasses.asdict(f), "load_high": f.loads.high, "load_low": f.loads.low, "skip": f.loads.skip}
    del out["loads"]
    return out


def print_plans(plans: Sequence[Plan]) -> None:
    """To stdout, for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    first = plans[0]
    info = first.sizes.info
    low = f", low copies {human(info.bytes_low)}" if info.has_low else ""
    console.print(
        f"[bold]{escape(first.weights.name)}[/]: {info.n_expert} experts in each of {info.n_moe_layer} layers, "
        f"{info.n_expert_used} used; experts {human(info.bytes_high)}{low}"
    )
    disk, compute = first.machine.disk, first.machine.compute
    if disk is not None:
        rates = ", ".join(f"{rate / 1e9:.2f} at {depth}" for depth, rate in disk.bandwidth.items())
        console.print(f"disk: GB/s in reads of {disk.read_bytes / 1024:.0f} KiB by queue depth: {rates}")
    console.print(
        f"cores: {compute.total * 1e3:.1f} ms a token with everything in memory ({compute.source}), "
        f"{first.machine.threads} threads"
    )
    for plan in plans:
        _print_plan(plan, console, Table)


def _print_plan(plan: Plan, console: Any, table_class: Any) -> None:
    sizes, chosen = plan.sizes, plan.modes[0]
    console.print()
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    console.print(
        f"[bold]{human(plan.budget)}, context {sizes.n_ctx}: {verdict}[/]" + (f" - {plan.problem}" if plan.problem else "")
    )
    if not plan.fits:
        console.print(f"with {human(chosen.budget)}:")
    spare = sizes.spare(chosen.budget) - max(chosen.pool, 0)
    less = min(sizes.longest - spare, chosen.pool - sizes.info.pool_min)  # then batches are cut
    lent = f"; while a long prompt is read {human(less)} less" if less > 0 else ""
    where = table_class(box=None, show_header=False, pad_edge=False)
    where.add_column()
    where.add_column(justify="right")
    where.add_column()
    for what, size, note in (
        ("dense weights", sizes.dense, f"without {human(sizes.embeddings)} of embeddings" if sizes.embeddings else ""),
        ("KV cache", sizes.kv, ""),
        ("buffers", sizes.buffers, ""),
        ("the process itself", sizes.process, ""),
        ("experts", max(chosen.pool, 0), f"{chosen.share:.0%} of them{lent}"),
        ("to spare", chosen.budget - sizes.held - max(chosen.pool, 0), ""),
    ):
        where.add_row(what, human(size), note)
    console.print(where)
    for f in plan.modes:
        console.print(
            f"{'[bold]' if f is chosen else ''}{f.mode}: {f.tok_s:.1f} tokens/s ({f.tok_s_low:.1f} to {f.tok_s_high:.1f})"
            f"{'[/]' if f is chosen else ''}, hit rate {f.hit_rate:.0%}, {f.mb_token:.1f} MB a token"
        )
    console.print(f"a prompt takes about {chosen.prompt_s:.1f} s of reading for each batch, whatever its length")
    for c in plan.choices:
        console.print(f"{c.setting} = {c.value}: {c.why}")
    console.print(plan.command, style="bold", markup=False)
    more = table_class(title=f"what memory buys ({chosen.mode})", title_justify="left")
    for head in ("memory", "resident", "hit rate", "MB/token", "tokens/s", "band"):
        more.add_column(head, justify="right")
    for f in plan.table:
        style = "bold" if f.budget == chosen.budget else None
        band = f"{f.tok_s_low:.1f} - {f.tok_s_high:.1f}"
        more.add_row(
            human(f.budget), f"{f.share:.0%}", f"{f.hit_rate:.0%}", f"{f.mb_token:.1f}", f"{f.tok_s:.1f}", band, style=style
        )
    console.print(more)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
