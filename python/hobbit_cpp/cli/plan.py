"""hobbit plan: will it run here, and how fast, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_batch_flags, add_threads_flag, batch_sizes, whole
from .output import check_writable, write_json

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="will it run here, and how fast",
        description="Says what a model takes, what goes where, how fast it will be and with which settings: from the "
        "file's header, a probe of disk and cores (seconds, kept per machine), and the statistics of real routing. "
        "Reads no weights. The exit code is 1 when it does not fit.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    add("--memory", metavar="SIZE", help="budget of the process: 8GiB, 50%%, or bytes (default: as hobbit run)")
    add("-c", "--ctx-size", metavar="N", type=whole, nargs="+", default=[4096], help="contexts (default: 4096)")
    add_threads_flag(parser)
    add_batch_flags(parser)
    add("--fresh", action="store_true", help="probe disk and cores again")
    add("--json", metavar="FILE", type=Path, help="write the plan as JSON; - for stdout")
    add("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Plans. Exit code 1 when it does not fit."""
    from hobbit_cpp._memory import parse_size
    from hobbit_cpp.bench.plan import make_plan, print_plans, to_json

    check_writable(args.json, args.model)
    if not args.model.exists():
        raise FileNotFoundError(f"{args.model}: no such file")
    if args.memory is not None:
        parse_size(args.memory, of=1 << 60)
    plans = [
        make_plan(args.model, args.memory, n_ctx, *batch_sizes(args), args.threads, args.fresh and i == 0)
        for i, n_ctx in enumerate(args.ctx_size)
    ]
    if args.json is None or str(args.json) != "-":
        print_plans(plans)
    if args.json is not None:
        documents = [to_json(plan) for plan in plans]
        write_json(args.json, documents[0] if len(documents) == 1 else documents)
    return 0 if all(plan.fits for plan in plans) else 1
