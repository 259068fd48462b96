"""hobbit bench: speed side by side."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, List

from .options import add_threads_flag
from .output import check_writable, write_json, write_whole
from .signals import sigterm_exits

if TYPE_CHECKING:
    from hobbit_cpp.bench.contenders import Contender

__all__ = ["add_parser", "run"]

_EPILOG = """\
contenders:
  mmap          stock llama.cpp, weights mapped; and, where the disk reads ahead otherwise, mmap-128: with 128 KiB
  none          stock llama.cpp with the whole model in memory, not capped
  exact, hobbit, lru, ...  the engine; NAME:key=value sets an OffloadParams (hobbit:prefetch_depth=0)
  resident      the engine with every expert in memory, not capped

  hobbit bench model.gguf --against mmap,lru,exact,hobbit --memory 25%,50%
  hobbit bench model.gguf --sweep memory=10%..100% --out sweep
  hobbit bench model.gguf --command 'rival=rival -m {model} -n {tokens}'
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure speed side by side",
        description="Runs each contender in a process of its own, in a memory cgroup of the same size where that may be, "
        "over the same tokens one at a time, alternating; prints medians, the conditions, and the bound that disk and "
        "cores set.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    add("--stock-model", metavar="FILE", type=Path, help="what stock llama.cpp runs (default: MODEL)")
    add("--against", metavar="NAMES", default="mmap,lru,exact,hobbit", help="default: mmap,lru,exact,hobbit")
    rival = "another program; {model}, {memory} in bytes, {tokens}, {prompt_tokens}, {threads}, {text} are filled in"
    add("--command", dest="rivals", metavar="NAME=CMD", action="append", default=[], help=rival)
    add("--command-regex", metavar="RE", help="finds its tokens/s: the first group of the last match")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--memory", metavar="SIZES", default="50%", help="1GiB,25%%,...; %% of the model (default: 50%%)")
    where.add_argument("--sweep", metavar="memory=A..B[:N]", help="N (6) sizes from A to B; draws speed and quality")
    add("--out", metavar="PREFIX", type=Path, default=Path("hobbit-sweep"), help="of a sweep's .csv and .png")
    add("--text", metavar="FILE", type=Path, help="what is read (default: prose that comes with Python)")
    add("--tokens", metavar="N", type=int, default=128, help="decoded one by one (default: 128)")
    add("--prompt-tokens", metavar="N", type=int, default=128, help="before them, at once (default: 128; 0: none)")
    add("--rounds", metavar="N", type=int, default=3, help="A B, B A, ...; medians (default: 3)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--cold", dest="warm", action="store_false", help="nothing cached at the start (default)")
    start.add_argument("--warm", dest="warm", action="store_true", help="as much of the text before the clock starts")
    add("--routing", metavar="TRACE.npz", type=Path, help="routing of a real model instead of this one's own")
    add("-c", "--ctx-size", metavar="N", type=int, default=0, help="default: as much as the text needs")
    add_threads_flag(parser)
    add("-b", "--batch-size", metavar="N", type=int, default=512, help="default: 512")
    add("-ub", "--ubatch-size", metavar="N", type=int, default=512, help="default: 512")
    add("--patience", metavar="S", type=float, default=120.0, help="seconds of decoding after which a run ends (120)")
    add("--fresh", action="store_true", help="probe disk and cores again")
    add("--json", metavar="FILE", type=Path, help="write all figures as JSON; - for stdout")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    add("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.set_defaults(function=run, warm=False)


def run(args: argparse.Namespace) -> int:
    """Measures. Exit code 1 when no contender gave a figure, or one went over its budget; 130 and 143 when it was ended early."""
    from hobbit_cpp.bench.measure import Request, measure
    from hobbit_cpp.bench.report import print_report

    _check(args)
    csv, picture = (args.out.with_name(args.out.name + suffix) for suffix in (".csv", ".png"))
    for path in (args.json, *((csv, picture) if args.sweep else ())):
        check_writable(path, args.model, args.stock_model, args.text, args.routing, text=path != picture)
    contenders = _contenders(args)
    whole = _model_bytes(args.model, contenders)
    request = Request(
        model=args.model,
        stock_model=args.stock_model or args.model,
        contenders=contenders,
        memories=_memories(args, whole),
        tokens=args.tokens,
        n_prompt=args.prompt_tokens,
        rounds=args.rounds,
        warm=args.warm,
        threads=args.threads,
        text=args.text,
        routing=args.routing,
        n_ctx=args.ctx_size,
        n_batch=args.batch_size,
        n_ubatch=args.ubatch_size,
        patience=args.patience,
        fresh=args.fresh,
        told=_silent if args.quiet else _tell,
    )
    # ended by a batch system, it leaves no process, no cgroup and no changed setting behind either
    with sigterm_exits():
        document = measure(request)
    # What hours of measuring gave: the one that fails keeps none of the others.
    with contextlib.ExitStack() as outputs:
        if args.sweep:
            outputs.callback(_write_sweep, document, whole, csv, picture)
        if str(args.json) != "-":
            outputs.callback(print_report, document)
        if args.json is not None:
            outputs.callback(write_json, args.json, document)
    if document["interrupted"]:
        return int(document["interrupted"])
    rows = document["rows"]
    return 0 if any("error" not in r for r in rows) and all(r.get("within_budget", True) for r in rows) else 1


def _check(args: argparse.Namespace) -> None:
    for path in (args.model, args.stock_model, args.text, args.routing):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
    least = {"tokens": 2, "prompt_tokens": 0, "rounds": 1, "ctx_size": 0, "batch_size": 1, "ubatch_size": 1}
    for name, n in least.items():
        if getattr(args, name) is not None and getattr(args, name) < n:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {n}")
    if args.patience <= 0:
        raise ValueError("--patience must be more than 0")
    if args.command_regex is not None and not args.rivals:
        raise ValueError("--command-regex needs --command")


def _contenders(args: argparse.Namespace) -> List[Contender]:
    from hobbit_cpp.bench.contenders import DEFAULT_REGEX, parse_command, parse_contenders

    out = parse_contenders(args.against)
    for command in args.rivals:
        rival = parse_command(command, args.command_regex or DEFAULT_REGEX)
        if rival.name in {c.name for c in out}:
            raise ValueError(f"--command {rival.name}: there is a contender of this name: choose another")
        out.append(rival)
    return out


def _model_bytes(model: Path, contenders: List[Contender]) -> int:
    """Of the model as stock llama.cpp would hold it: without low-precision copies.

    The engine reads the header with the settings of each contender: a mode that it does not have, or a value out of range, is
    said now and not in the middle of the night.
    """
    from hobbit_cpp._session import Session
    from hobbit_cpp.errors import ParameterError
    from hobbit_cpp.params import OffloadParams

    tried = {"": OffloadParams()}
    tried.update({c.name: OffloadParams(mode=c.mode, **c.options) for c in contenders if c.kind == "offload"})
    for name, params in tried.items():
        try:
            session = Session(str(model), params)
        except ParameterError as e:
            raise ParameterError(f"--against {name}: {e}") from None
        whole = session.info.bytes_dense + session.info.bytes_high
        session.close()
    return whole


def _memories(args: argparse.Namespace, whole: int) -> List[int]:
    from hobbit_cpp._memory import parse_size
    from hobbit_cpp.bench.sweep import parse_sweep

    if args.sweep:
        return parse_sweep(args.sweep, whole)
    sizes = [part.strip() for part in args.memory.split(",") if part.strip()]
    if not sizes:
        raise ValueError("--memory is empty")
    return list(dict.fromkeys(parse_size(s, of=whole) for s in sizes))


def _write_sweep(document: Any, whole: int, csv: Path, picture: Path) -> None:
    from hobbit_cpp.bench.report import condition_lines
    from hobbit_cpp.bench.sweep import csv_text, draw, have_matplotlib

    write_whole(csv, csv_text(document["rows"], whole))
    print(f"written: {csv}", file=sys.stderr)
    if not have_matplotlib():
        print("no picture: pip install 'hobbit-cpp[plot]' brings matplotlib", file=sys.stderr)
        return
    lines = condition_lines(document)
    draw(picture, document["rows"], lines[0], lines[1])
    print(f"written: {picture}", file=sys.stderr)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass
