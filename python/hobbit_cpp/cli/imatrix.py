"""hobbit imatrix: an importance matrix of the experts, for hobbit convert --imatrix."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .._progress import make_progress
from .options import positive
from .signals import sigterm_exits
from .text_run import add_text_run_flags, check_text_run, read_text, text_name

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "imatrix",
        help="collect an importance matrix, for better low-precision copies",
        description="Runs a model over a text in exact mode, without generating anything, and writes what its routers send to "
        "each expert: the sums of squares of the inputs by column, as llama.cpp's llama-imatrix writes them. `hobbit convert "
        "--imatrix` and llama-quantize read it. The file appears whole or not at all.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="the text; - reads it from stdin")
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, help="the new file (default: MODEL.imatrix.gguf, where convert finds it)"
    )
    parser.add_argument("-n", "--tokens", metavar="N", type=positive, help="stop after N tokens (default: all of the text)")
    parser.add_argument(
        "--inputs", metavar="N", type=int, default=4096,
        help="tokens whose inputs are kept, so that convert can make good in later columns what it rounds away in earlier ones; "
        "2 bytes a layer and column (default: 4096; 0: none)",
    )  # fmt: skip
    parser.add_argument("-c", "--ctx", metavar="N", type=positive, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument(
        "-b", "--batch-size", metavar="N", type=positive, default=512,
        help="tokens computed at once (default: 512); fewer take less memory, and more reads",
    )  # fmt: skip
    add_text_run_flags(parser, "OUT")
    parser.set_defaults(function=run, when_interrupted="; no file was left")


def run(args: argparse.Namespace) -> int:
    """Collects."""
    from hobbit_cpp.imatrix import imatrix_path, record_imatrix

    out = imatrix_path(args.model) if args.output is None else args.output
    check_text_run(args, out)
    text = read_text(args.text, args.tokens)
    begin = time.monotonic()
    progress = make_progress("collecting", "tokens", show=not args.quiet)
    try:
        with sigterm_exits():  # leaves no partial file
            report = record_imatrix(
                args.model,
                text,
                out,
                n_tokens=args.tokens,
                inputs=args.inputs,
                context=args.ctx,
                batch=args.batch_size,
                memory=args.memory,
                expert_cache=args.expert_cache,
                threads=args.threads,
                dataset=text_name(args.text),
                progress=progress.update,
            )
    finally:
        progress.close()
    if not args.quiet:
        unused = f"; {report.n_unused} of {report.n_experts} experts have no data: a longer text" if report.n_unused else ""
        print(
            f"{out}: {report.n_tensors} tensors, {report.n_tokens} tokens, the inputs of {report.n_inputs}, "
            f"at least {report.fewest} for an expert that was used{unused}; {time.monotonic() - begin:.1f} s",
            file=sys.stderr,
        )
    return 0
