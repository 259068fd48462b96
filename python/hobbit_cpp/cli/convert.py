"""hobbit convert: a GGUF with experts in two precisions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .signals import sigterm_exits

if TYPE_CHECKING:
    from hobbit_cpp.convert import ConvertReport

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="make a GGUF with high- and low-precision experts",
        description="Makes a GGUF with high- and low-precision experts of a Mixture-of-Experts GGUF. "
        "The new file appears whole or not at all.",
        epilog="Types are those of llama.cpp: Q8_0, Q6_K, Q5_0, Q4_K, Q4_0, IQ4_NL, Q3_K, Q2_K, ...",
    )
    parser.add_argument("input", metavar="IN", type=Path, help="the model; of a split one any part")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the new file")
    parser.add_argument("--high", metavar="TYPE", default="keep", help="type of the experts; keep: as in IN (default)")
    parser.add_argument(
        "--low",
        metavar="TYPE",
        default="Q4_0",
        help="type of the low-precision copies; none: no copies (default: Q4_0)",
    )
    parser.add_argument("-t", "--threads", metavar="N", type=int, help="threads (default: all cores)")
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no report")
    parser.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.set_defaults(function=run, when_interrupted="; no file was left")


def run(args: argparse.Namespace) -> int:
    """Converts."""
    from hobbit_cpp.convert import convert

    with sigterm_exits():  # leaves no partial file
        report = convert(
            args.input,
            args.output,
            high=args.high,
            low=args.low,
            threads=args.threads,
            force=args.force,
            progress=not args.quiet,
        )
    if not args.quiet:
        print_report(report)
    return 0


def print_report(report: ConvertReport) -> None:
    """What was made, on stderr."""
    from hobbit_cpp.convert.progress import human_bytes

    for line in report.fallbacks:
        print(f"note: {line}", file=sys.stderr)
    rate = report.bytes_source / max(report.seconds, 1e-9)
    print(
        f"{report.path}: {human_bytes(report.bytes_file)}\n"
        f"  dense   {human_bytes(report.bytes_dense):>12}\n"
        f"  high    {human_bytes(report.bytes_high):>12}  {report.high_type}\n"
        f"  low     {human_bytes(report.bytes_low):>12}  {report.low_type}\n"
        f"  experts {report.n_experts} in each of {report.n_layers} layers\n"
        f"  {report.seconds:.1f} s, {human_bytes(rate)}/s read",
        file=sys.stderr,
    )
