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
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="the new file (--sidecar: default IN.low.gguf)")
    parser.add_argument("--high", metavar="TYPE", default="keep", help="type of the experts; keep: as in IN (default)")
    low = parser.add_mutually_exclusive_group()
    low.add_argument("--low", metavar="TYPE", help="type of the low-precision copies; none: no copies; default: by the high one")
    low.add_argument(
        "--low-from",
        metavar="FILE",
        type=Path,
        help="another checkpoint of the same model: its experts are the low-precision copies, as they are",
    )
    parser.add_argument("--sidecar", action="store_true", help="write only the low-precision copies, to use beside IN as it is")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance matrix of llama.cpp, for all experts that are quantised; none: none (default: IN.imatrix.gguf if it is "
        "there, which `hobbit imatrix` makes)",
    )
    parser.add_argument(
        "--split-max-size",
        metavar="SIZE",
        type=_part_bytes,
        help="write parts of at most this size, OUT-00001-of-0000N.gguf: 2G, 500M (powers of 1000, as in llama.cpp), 4GiB",
    )
    parser.add_argument("-t", "--threads", metavar="N", type=int, help="threads (default: all processors)")
    parser.add_argument("-f", "--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no report")
    parser.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.set_defaults(function=run, when_interrupted="; no file was left")


def run(args: argparse.Namespace) -> int:
    """Converts."""
    from hobbit_cpp.convert import convert

    if args.output is None and not args.sidecar:
        print("hobbit convert: the name of the new file is missing: -o OUT", file=sys.stderr)
        return 2

    with sigterm_exits():  # leaves no partial file
        report = convert(
            args.input,
            args.output,
            high=args.high,
            low="auto" if args.low is None else args.low,
            low_from=args.low_from,
            sidecar=args.sidecar,
            imatrix=args.imatrix,
            split_max_bytes=args.split_max_size,
            threads=args.threads,
            force=args.force,
            progress=not args.quiet,
        )
    if not args.quiet:
        print_report(report)
    return 0


def _part_bytes(text: str) -> int:
    """Of --split-max-size: llama.cpp's 500M and 2G, or any size that --memory takes."""
    from hobbit_cpp._memory import parse_size
    from hobbit_cpp.errors import HobbitError

    try:
        return parse_size(f"{text}B" if text[-1:] in ("M", "G") else text)
    except HobbitError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def print_report(report: ConvertReport) -> None:
    """What was made, on stderr."""
    from hobbit_cpp._memory import human

    for line in report.fallbacks:
        print(f"note: {line}", file=sys.stderr)
    rate = report.bytes_source / max(report.seconds, 1e-9)
    rows = [("dense", report.bytes_dense, ""), ("high", report.bytes_high, report.high_type)]
    rows = [row for row in rows if row[1] > 0] + [("low", report.bytes_low, report.low_type)]
    parts = f" in {len(report.paths)} parts" if len(report.paths) > 1 else ""
    print(
        f"{report.path}: {human(report.bytes_file)}{parts}\n"
        + "".join(f"  {name:<7} {human(size):>12}  {kind}".rstrip() + "\n" for name, size, kind in rows)
        + f"  experts {report.n_experts} in each of {report.n_layers} layers\n"
        f"  {report.seconds:.1f} s, {human(rate)}/s read",
        file=sys.stderr,
    )
