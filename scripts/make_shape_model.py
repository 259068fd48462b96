#!/usr/bin/env python3
"""Write a GGUF with random weights and the shapes of a well-known mixture-of-experts model, to measure speed with.

    scripts/make_shape_model.py --like qwen3-30b-a3b --out qwen3-shape.gguf --high Q4_K --low Q2_K

Both llama.cpp and hobbit-cpp run it (llama.cpp only without --low). Its text is noise, and its router is noise too: every
expert is chosen alike, so that the hit rate is the share of the experts that are cached. For the hit rate of a real model, replay
the routing of one: hobbit bench FILE --routing TRACE.npz.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from shape_model import SHAPES, make


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--high", metavar="TYPE", help="type of the experts (default: what such files usually have)")
    parser.add_argument("--low", metavar="TYPE", help="type of low-precision copies (default: none)")
    parser.add_argument("--dense", metavar="TYPE", default="Q8_0", help="type of the other matrices (default: Q8_0)")
    parser.add_argument("--layers", metavar="N", type=int, help="fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the file")
    args = parser.parse_args(arguments)
    try:
        report = make(
            args.like, args.out, high=args.high, low=args.low, dense=args.dense, layers=args.layers, seed=args.seed,
            force=args.force,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{report.path}: {report.bytes_file / 2**30:.2f} GiB, experts {report.high_type}, low copies {report.low_type}, "
        f"{report.seconds:.0f} s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
