"""hobbit trace: records the routing of a model over a text."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from .._progress import make_progress
from .options import positive
from .text_run import add_text_run_flags, check_text_run, read_text, text_name

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="record a model's routing over a text",
        description="Runs a model over a text, without generating anything, and writes which experts its routers select, with "
        "their weights, for each token and layer. `hobbit replay` reads that. The file appears whole or not at all.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="the text; - reads it from stdin")
    parser.add_argument("-o", "--output", metavar="TRACE.npz", type=Path, required=True, help="the new file")
    parser.add_argument("-n", "--tokens", metavar="N", type=positive, help="stop after N tokens (default: all of the text)")
    parser.add_argument("-c", "--ctx", metavar="N", type=positive, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument(
        "--documents", action="store_true", help="a sequence is what stands between blank lines, cut at --ctx tokens"
    )
    parser.add_argument(
        "--predictions",
        metavar="DEPTH",
        nargs="?",
        type=int,
        choices=range(1, 5),
        const=1,
        default=0,
        help="also what each layer's input says to the routers of the next DEPTH layers, 1 to 4 (1 when not given)",
    )
    add_text_run_flags(parser, "TRACE.npz")
    parser.set_defaults(function=run, when_interrupted="; no file was left")


def run(args: argparse.Namespace) -> int:
    """Records."""
    check_text_run(args, args.output)
    # Of a document no more than --ctx tokens are taken, of however many.
    text = read_text(args.text, None if args.documents else args.tokens)
    from hobbit_cpp.trace import record

    begin = time.monotonic()
    progress = make_progress("tracing", "tokens", show=not args.quiet)
    try:
        trace = record(
            args.model,
            text,
            n_tokens=args.tokens,
            context=args.ctx,
            documents=args.documents,
            predictions=args.predictions,
            memory=args.memory,
            expert_cache=args.expert_cache,
            threads=args.threads,
            meta={"text": text_name(args.text)},
            progress=progress.update,
        )
    finally:
        progress.close()
    trace.save(args.output)
    if not args.quiet:
        print(
            f"{args.output}: {trace.n_tokens} tokens in {len(trace.lens)} sequences, {trace.n_layers} layers, top-{trace.k} of "
            f"{trace.n_experts} experts{f', predictions {trace.depth} layers ahead' if trace.depth else ''}; "
            f"{time.monotonic() - begin:.1f} s",
            file=sys.stderr,
        )
    return 0
