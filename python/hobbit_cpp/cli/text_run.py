"""What `trace`, `imatrix` and `calibrate` share: a model is run over a text, and one new file is written."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from .._texts import enough_bytes, read_part
from .options import add_threads_flag
from .output import check_writable

__all__ = ["add_text_run_flags", "check_text_run", "read_text"]


def add_text_run_flags(parser: argparse.ArgumentParser, out: str) -> None:
    """The budget, and what happens to the new file; `out`: its name in the help."""
    parser.add_argument("--memory", metavar="SIZE", help="budget of the process: 4GiB, 50%%, or bytes")
    parser.add_argument("--expert-cache", metavar="SIZE", help="of that for experts (default: what is left)")
    add_threads_flag(parser)
    parser.add_argument("-f", "--force", action="store_true", help=f"replace {out} if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no report")
    parser.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")


def check_text_run(args: argparse.Namespace, output: Path, stdin: bool = True) -> None:
    """Before an hour of work: the model, the text (`stdin`: or "-") and a place for the new file are there.

    Raises:
        FileNotFoundError: one of them is not.
        ValueError: the new file cannot be written, or is one of those that are read.
        FileExistsError: the new file is there already, and --force is not given.
    """
    for path in (args.model, args.text):
        if not (path.exists() or (stdin and str(path) == "-")):
            raise FileNotFoundError(f"{path}: no such file")
    check_writable(output, args.model, args.text, text=False)
    if output.exists():
        if not output.is_file():
            raise ValueError(f"{output} is not a file")
        if not args.force:
            raise FileExistsError(f"{output} exists: --force replaces it")


def text_name(path: Path) -> str:
    """What a text is called in a file that was made of it."""
    return "stdin" if str(path) == "-" else path.name


def read_text(path: Path, n_tokens: int | None = None) -> str:
    """The text of a file, of stdin for "-", or as much of its beginning as `n_tokens` can need; ValueError when it is none."""
    # Four times, since a pipe cannot be asked again.
    most = None if n_tokens is None else 4 * enough_bytes(n_tokens)
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if str(path) == "-" else stack.enter_context(open(path, "rb"))
        text, _ = read_part(file, path, most)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
