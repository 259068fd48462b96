"""hobbit calibrate: thresholds, the quality curve behind --quality, eviction weights."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import positive
from .text_run import add_text_run_flags, check_text_run

if TYPE_CHECKING:
    from hobbit_cpp.calibrate.store import Calibration

__all__ = ["add_parser", "print_calibration", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "calibrate",
        help="measure what low precision costs, for --quality",
        description="Measures on a text what it costs to serve less in high precision, sets thresholds at the paper's quantiles, "
        "and finds weights for eviction rule eq. 3. The result stands in MODEL.calibration.json, is found there by its name, and "
        "is what --quality goes by.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF with low-precision copies, or with a sidecar")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a text like what the model will be used for")
    parser.add_argument("--tokens", metavar="N", type=positive, default=2048, help="predictions scored; default: 2048")
    parser.add_argument("-c", "--ctx-size", metavar="N", type=positive, default=512, help="tokens of a window; default: 512")
    parser.add_argument(
        "--paper", action="store_true", help="keep the thresholds 0.6 and 0.9 for --quality paper, instead of 67/30/3 %%"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: MODEL.calibration.json beside the model")
    parser.add_argument("--low-model", metavar="SIDECAR", help="its sidecar (default: MODEL.low.gguf if it is there)")
    add_text_run_flags(parser, "FILE")
    parser.add_argument("--scratch", metavar="DIR", type=Path, help="for predictions of exact mode: 2 bytes a token and word")
    parser.set_defaults(function=run, when_interrupted="; no file was written")


def run(args: argparse.Namespace) -> int:
    """Calibrates."""
    from hobbit_cpp._progress import Phases
    from hobbit_cpp.calibrate.measure import calibrate
    from hobbit_cpp.calibrate.store import calibration_path

    from .output import write_whole

    output: Path = args.output or calibration_path(args.model)
    check_text_run(args, output, stdin=False)
    if args.tokens < 3:  # two thirds are for finding weights, the rest for checking them
        raise ValueError("--tokens must be 3 at least")
    if args.ctx_size < 2:
        raise ValueError("a window (-c) needs two tokens at least")
    phases = Phases(not args.quiet)

    def progress(doing: str, done: int, total: int) -> None:
        phases.update(doing, "tokens" if doing == "measuring" else "settings", done, total)

    try:
        found = calibrate(
            args.model,
            args.text,
            n_tokens=args.tokens,
            window=args.ctx_size,
            paper=args.paper,
            memory=args.memory,
            expert_cache=args.expert_cache,
            low_model=args.low_model,
            threads=args.threads,
            scratch=args.scratch,
            progress=progress,
        )
    finally:
        phases.close()
    write_whole(output, found.to_json())
    if not args.quiet:
        print_calibration(found)
        print(f"written: {output}", file=sys.stderr)
    return 0


def print_calibration(found: Calibration) -> None:
    """For people, on stdout: what was measured, and what the qualities come to."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    text, curve = found.text, found.curve
    tokens = f"{text['tokens']} tokens of {text['name']}, perplexity in exact mode {text['perplexity']:.2f}"
    console.print(tokens, markup=False)
    measured = Table("high/low/skipped", "perplexity", "± (s.e.)", "KL, nats", "same top-1", "bytes asked", box=None)
    for p in curve.points:
        high, low, skipped = p.served
        measured.add_row(
            f"{high:.2f}/{low:.2f}/{skipped:.2f}",
            f"{math.expm1(p.loss):+.2%}",
            f"{p.loss_se * math.exp(p.loss):.2%}",
            f"{p.kl:.4f}",
            f"{p.top1:.1%}",
            f"{curve.asked(p.low, p.skipped):.0%}",
        )
    console.print(measured)
    blocks = sorted(range(len(curve.sensitivity)), key=lambda layer: -curve.sensitivity[layer])
    spread = ", ".join(f"{layer} {curve.sensitivity[layer]:.2f}" for layer in blocks[:6])
    console.print(
        f"sensitivity of the MoE layers, the most sensitive first: {spread}; median {statistics.median(curve.sensitivity):.2f}, "
        f"least {min(curve.sensitivity):.2f}"
    )
    by_low, by_skipping = (f"{ratio:.2f} ± {error:.2f} times" for ratio, error in curve.ratios)
    console.print(
        f"any change at all makes a divergence of {curve.noise:.4f}; perplexity changes by {by_low} what low precision adds to it"
        + (f", by {by_skipping} what skipping adds" if curve.k > 1 else "")
    )
    chosen = Table("--quality", "high/low/skipped", "bytes asked", "t1", "t2", box=None)
    for name, row in curve.plain().items():
        served = f"{row['high']:.2f}/{row['low']:.2f}/{row['skipped']:.2f}"
        chosen.add_row(name, served, f"{row['bytes']:.0%}", f"{row['t1']:.3f}", f"{row['t2']:.3f}")
    t1, t2 = found.thresholds
    chosen.add_row("paper", "", "", f"{t1:.3f}", f"{t2:.3f}")
    console.print(chosen)
    rows = found.eviction["penalty_by_lru"]
    weights = ", ".join(f"{w:g}" for w in found.eviction["found"])
    kept = "kept" if found.eviction_weights is not None else "not better there: not kept"
    others = ", ".join(f"{name} {row['held_out']:.3f}" for name, row in rows.items() if name not in ("lru", "found"))
    console.print(
        f"eq. 3 with {weights}: miss penalty {rows['found']['held_out']:.3f} of LRU's on held-out text ({kept}); {others}"
    )
