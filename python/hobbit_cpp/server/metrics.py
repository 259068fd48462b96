"""Statistics of the offload in the text format of Prometheus (0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import _memory

__all__ = ["CONTENT_TYPE", "Requests", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Requests:
    """Counts of the server itself."""

    def __init__(self) -> None:
        self.running = 0
        """In work or waiting for their turn."""
        self.by_code: dict[int, int] = {}
        """Ended, by status code; 499: the client went away."""


class _Text:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, kind: str, name: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> None:
        self.lines += [f"# HELP hobbit_{name} {help_}", f"# TYPE hobbit_{name} {kind}"]
        for labels, value in samples:
            inside = ",".join(f'{key}="{text}"' for key, text in labels.items())
            self.lines.append(f"hobbit_{name}{'{' + inside + '}' if inside else ''} {value!r}")

    def counter(self, name: str, help_: str, value: float) -> None:
        self.add("counter", name, help_, [({}, value)])

    def gauge(self, name: str, help_: str, value: float) -> None:
        self.add("gauge", name, help_, [({}, value)])


def _by(label: str, **values: float) -> list[tuple[Mapping[str, str], float]]:
    return [({label: key}, value) for key, value in values.items()]


def render(requests: Requests, stats: Any = None) -> str:
    """`stats`: OffloadStats, None without offload."""
    text = _Text()
    codes: list[tuple[Mapping[str, str], float]] = [({"code": str(c)}, n) for c, n in sorted(requests.by_code.items())]
    text.add("counter", "http_requests_total", "Requests that ended; 499: the client went away.", codes)
    text.gauge("http_requests", "Requests in work or waiting for their turn.", requests.running)
    text.gauge("memory_bytes", "Resident memory of the process without page cache.", _memory.resident())
    text.gauge("memory_peak_bytes", "Most that was resident.", _memory.peak_resident())
    if stats is not None:
        _offload(text, stats)
    return "\n".join(text.lines) + "\n"


def _offload(text: _Text, s: Any) -> None:
    text.counter("tokens_total", "Tokens evaluated, of prompts and of answers.", s.n_tokens)
    text.counter("selections_total", "Experts selected by the routers: hits + loads + skips.", s.selections)
    text.add("counter", "hits_total", "Selections served from memory.", _by("precision", high=s.hits_high, low=s.hits_low))
    text.add("counter", "loads_total", "Selections that were read.", _by("precision", high=s.loads_high, low=s.loads_low))
    text.counter("skips_total", "Selections left out.", s.skips)
    mass = {"high": s.mass_total - s.mass_low - s.mass_skipped, "low": s.mass_low, "skipped": s.mass_skipped}
    text.add("counter", "router_mass_total", "Router weight served, 1 per token and layer.", _by("precision", **mass))
    ends = {"useful": s.prefetches_useful, "late": s.prefetches_late, "wasted": s.prefetches_wasted}
    text.add("counter", "prefetches_total", "Experts read ahead, by what came of it.", _by("result", **ends))
    text.counter("prefetches_started_total", "Experts whose read ahead was started.", s.prefetches)
    read = {"demand": s.bytes_demand, "prefetch": s.bytes_prefetch}
    text.add("counter", "read_bytes_total", "Bytes read from disk.", _by("cause", **read))
    text.counter("wasted_bytes_total", "Bytes read ahead in vain.", s.bytes_wasted)
    text.counter("warmed_bytes_total", "Bytes read into the empty pool, by what earlier runs used.", s.bytes_warmed)
    text.counter("stall_seconds_total", "Time in which nothing could be computed for want of experts.", s.stall_seconds)
    text.counter("expert_seconds_total", "Time in the products of experts.", s.expert_seconds)
    text.counter("eval_seconds_total", "Time in llama_decode.", s.eval_seconds)
    text.gauge("memory_budget_bytes", "The budget of the process.", s.memory_budget)
    text.gauge("pool_bytes", "Size of the expert pool.", s.pool_bytes)
    steps = {"shrink": s.pool_shrinks, "grow": s.pool_grows}
    text.add("counter", "pool_steps_total", "Times that the pool gave memory back, or took it again.", _by("direction", **steps))
    text.add("gauge", "slots", "Experts that the pool can hold.", _by("precision", high=s.slots_high, low=s.slots_low))
    there = _by("precision", high=s.resident_high, low=s.resident_low)
    text.add("gauge", "resident_experts", "Experts that it holds.", there)
