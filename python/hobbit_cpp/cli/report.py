"""hobbit report: a page about a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .output import check_writable, write_whole

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="draw what was measured: one HTML page",
        description="Makes one self-contained HTML page of what hobbit run --json-stats (with --record: more), hobbit trace, "
        "hobbit bench --json and hobbit eval --json wrote. Several files make one page.",
    )
    parser.add_argument(
        "inputs", metavar="FILE", nargs="+", type=Path, help="a JSON, a TRACE.npz, or a CSV of seconds, resident, budget"
    )
    parser.add_argument("-o", "--output", metavar="HTML", type=Path, required=True, help="the page")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Draws."""
    for path in args.inputs:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    check_writable(args.output, *args.inputs)
    from hobbit_cpp.report import page, read

    text = page(read(args.inputs))
    write_whole(args.output, text)
    print(f"{args.output}: {len(text.encode('utf-8', 'backslashreplace')) / 1e6:.2f} MB, open it in a browser", file=sys.stderr)
    return 0
