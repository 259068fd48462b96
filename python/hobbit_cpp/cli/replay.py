"""hobbit replay: cache policies over a recorded routing, without a model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Optional

from .._progress import make_progress
from . import options
from .output import check_writable, write_json

__all__ = ["add_parser", "run"]

_DEFAULT_POLICIES = "lru,layer-lru,lfu,hobbit,lcu,fate,default,belady"


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "replay",
        help="compare cache policies over a recorded routing",
        description="Runs the engine's cache, precision and prefetch rules over a trace (hobbit trace), without a model: hit "
        "rate, miss penalty, bytes read, and the share of the gap between LRU and Belady's optimum that a policy closes.",
        epilog="Policies: lru, layer-lru, lfu (textbook caches), hobbit (eq. 3), lcu (MoE-APEX), foresight (ours), layer-arc, "
        "fate (its whole mode), default (what the engine uses when nothing is said), belady (the optimum; with two precisions "
        "a lower bound).",
    )
    parser.add_argument("trace", metavar="TRACE.npz", type=Path, help="made by hobbit trace")
    parser.add_argument("--cache", metavar="SHARES", default="12.5%,25%,50%", help="of all experts (default: 12.5%%,25%%,50%%)")
    parser.add_argument("--policy", metavar="NAMES", default=_DEFAULT_POLICIES, help=f"default: {_DEFAULT_POLICIES}")
    parser.add_argument("-n", "--tokens", metavar="N", type=options.positive, help="the first N tokens of the trace only")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no table")
    parser.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures; - for stdout")

    group = parser.add_argument_group("precision")
    group.add_argument("--exact", action="store_true", help="one precision")
    group.add_argument("--precision-rule", choices=["miss", "weight"], default="miss", help="with two (default: miss)")
    group.add_argument("--high-bytes", metavar="SIZE", default="8MiB", help="of an expert (default: 8MiB)")
    group.add_argument("--low-bytes", metavar="SIZE", help="of its low copy; none: no copies (default: as IQ4_NL of Q8_0)")
    group.add_argument("--model", metavar="MODEL", type=Path, help="take both from a GGUF of the trace's shape")
    group.add_argument("--low-share", metavar="SHARE", type=float, help="of the cache for low copies (default: the mode's)")

    group = parser.add_argument_group("prefetch")
    group.add_argument(
        "--prefetch",
        metavar="DEPTH",
        type=int,
        choices=range(5),
        help="layers that are read ahead, for every policy; 0: none (default: as default and fate have it, the others none)",
    )
    group.add_argument(
        "--recall", metavar="SHARE", type=float, help="make predictions up that name a selected expert with this probability"
    )
    group.add_argument("--prefetch-reads", metavar="N", type=options.positive, help="most of these reads at a time")

    group = parser.add_argument_group("simulated clock (with --bandwidth)")
    group.add_argument("--bandwidth", metavar="GB/S", type=float, help="of the disk")
    group.add_argument("--latency", metavar="US", type=float, default=100.0, help="of a read, microseconds (default: 100)")
    group.add_argument("--queue-depth", metavar="N", type=options.positive, help="reads at a time (default: the engine's, 8)")
    group.add_argument("--compute", metavar="MS", type=float, default=0.0, help="of a token, all experts in memory (default: 0)")
    group.add_argument(
        "--expert-share", metavar="SHARE", type=float, default=0.6, help="of that in the experts' products (default: 0.6)"
    )

    group = parser.add_argument_group("conventions (default: selection and trace for textbook caches, else layer and sequence)")
    group.add_argument("--accesses", choices=["selection", "layer"], help="a layer's experts one by one or together")
    group.add_argument("--uses", choices=["trace", "sequence"], help="how long uses are counted")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Replays."""
    from dataclasses import asdict

    from hobbit_cpp import OffloadParams
    from hobbit_cpp.replay import Replay, ReplaySettings, parse_bytes, parse_cache
    from hobbit_cpp.trace import Trace

    check_writable(args.json, args.trace, args.model)
    caches = [parse_cache(part.strip()) for part in args.cache.split(",")]
    policies = [name.strip() for name in args.policy.split(",") if name.strip()]
    settings = ReplaySettings(
        exact=args.exact,
        precision_rule=args.precision_rule,
        prefetch=args.prefetch,
        accesses=args.accesses,
        uses=args.uses,
        token_ms=args.compute,
        expert_share=args.expert_share,
        bandwidth=args.bandwidth * 1e9 if args.bandwidth is not None else None,
        latency=args.latency / 1e6,
        params=OffloadParams(low_share=args.low_share, io_threads=args.queue_depth, prefetch_reads=args.prefetch_reads),
    )
    trace = Trace.load(args.trace)
    if args.tokens is not None:
        trace = trace.head(args.tokens)
    if args.recall is not None:
        trace = trace.with_predictions(args.recall, depth=max(1, args.prefetch or 1))
    replay = Replay(
        trace,
        bytes_high=parse_bytes(args.high_bytes),
        bytes_low=None if args.low_bytes is None else parse_bytes(args.low_bytes),
        model=args.model,
    )
    begin = time.monotonic()
    progress = make_progress("replaying", "runs", show=not args.quiet)
    try:
        rows = replay.table(policies, caches, settings, progress.update)
    finally:
        progress.close()
    one = settings.exact or replay.bytes_low == 0
    result = {
        "trace": {
            "file": str(args.trace),
            "tokens": trace.n_tokens,
            "sequences": len(trace.lens),
            "layers": trace.n_layers,
            "k": trace.k,
            "n_experts": trace.n_experts,
            "predictions": trace.depth,
            "made_up_recall": args.recall,
            "meta": trace.meta,
        },
        "conditions": {
            "exact": one,
            "bytes_high": replay.bytes_high,
            "bytes_low": replay.bytes_low,
            "bandwidth": settings.bandwidth,
            "latency": settings.latency,
            "queue_depth": args.queue_depth,
            "token_ms": settings.token_ms,
            "expert_share": settings.expert_share,
            "bound": "optimum" if one else "lower bound, the low copy being a part of the high one",
        },
        "rows": [asdict(row) for row in rows],
        "seconds": time.monotonic() - begin,
    }
    if args.json is not None:
        write_json(args.json, result)
    if not args.quiet and str(args.json) != "-":
        from rich.console import Console

        show(result, Console() if sys.stdout.isatty() else Console(width=130))
    return 0


def show(result: dict[str, Any], console: Any) -> None:
    """The table, and the conditions under it."""
    from rich.table import Table

    rows, conditions, trace = result["rows"], result["conditions"], result["trace"]
    exact, clock = conditions["exact"], conditions["bandwidth"] is not None
    ahead = any(row["prefetches"] for row in rows)
    columns = ["cache", "policy", "hit\nrate", "MB/\ntoken", "gap\nclosed"]
    columns += [] if exact else ["miss\npenalty", "high/low/\nskipped"]
    columns += ["ahead: useful/\nlate/wasted"] if ahead else []
    columns += ["tokens/s", "stalled"] if clock else []
    table = Table()
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        new = i == 0 or rows[i - 1]["cache"] != row["cache"]
        if new and i > 0:
            table.add_section()
        cells = [f"{100 * row['cache']:.4g} %" if new else "", row["policy"], _share(row["hit_rate"])]
        cells += [f"{row['bytes_per_token'] / 1e6:.1f}", _share(row["gap_closed"], 2)]
        if not exact:
            high, low = row["hits_high"] + row["loads_high"], row["hits_low"] + row["loads_low"]
            parts = [n / row["selections"] for n in (high, low, row["skips"])]
            bound = row["policy"] == "belady"
            cells += [_share(row["miss_penalty"]), "" if bound else "/".join(_share(p, 2) for p in parts)]
        if ahead:
            n = max(row["prefetches"], 1)
            counts = [row[f"prefetches_{how}"] / n for how in ("useful", "late", "wasted")]
            cells += ["/".join(_share(c, 2) for c in counts) if row["prefetches"] else ""]
        if clock:
            speed = row["tokens_per_second"]
            cells += ["" if speed is None else f"{speed:.2f}", _share(row["stall_share"], 2)]
        table.add_row(*cells)
    console.print(table)
    for line in notes(result):
        console.print(line, highlight=False, style="dim")
    console.print(
        f"{trace['tokens']} tokens in {trace['sequences']} sequences, {trace['layers']} layers, top-{trace['k']} of "
        f"{trace['n_experts']} experts; {result['seconds']:.1f} s",
        highlight=False,
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be said beside the figures."""
    rows, conditions = result["rows"], result["conditions"]
    out = []
    high, low = conditions["bytes_high"], conditions["bytes_low"]
    if conditions["exact"]:
        out.append(f"one precision, {high / 1e6:.3g} MB an expert")
    else:
        out.append(f"{high / 1e6:.3g} MB an expert in high precision, {low / 1e6:.3g} MB in low; belady: a lower bound")
    by_selection = sorted({row["policy"] for row in rows if row["accesses"] == "selection"})
    by_layer = sorted({row["policy"] for row in rows if row["accesses"] == "layer"})
    if by_selection and by_layer:
        by_layer_text = f"a layer at a time, as the engine does it: {', '.join(by_layer)}"
        out.append(f"selection by selection: {', '.join(by_selection)}; {by_layer_text}")
    no_guess = result["trace"]["predictions"] == 0 and any(row["precision"] == "demand" for row in rows)
    if no_guess:
        out.append("fate lives on reading ahead, and the trace has no predictions: --recall 0.8 makes some up")
    ahead = sorted({row["policy"] for row in rows if row["prefetches"]})
    if ahead and len(ahead) < len({row["policy"] for row in rows}):
        out.append(f"reads ahead by the trace's predictions: {', '.join(ahead)}; --prefetch 0 compares the caches alone")
    if conditions["bandwidth"] is not None:
        depth = conditions["queue_depth"] or "the engine's 8"
        out.append(
            f"clock: {conditions['token_ms']:g} ms a token to compute, {conditions['bandwidth'] / 1e9:g} GB/s, "
            f"{conditions['latency'] * 1e6:g} us a read, queue depth {depth}"
        )
    return out


def _share(value: Optional[float], digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if -1 < value < 1 else f"{value:.{digits}f}"
