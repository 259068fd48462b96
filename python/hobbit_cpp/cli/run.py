"""hobbit run: answers one prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .generate import Model

__all__ = ["add_parser", "load_model", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="answer a prompt",
        description="Streams the answer to a prompt to stdout, then a summary to stderr.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    add_prompt_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--json-stats", metavar="FILE", type=Path, help="write times and statistics as JSON")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="llama.cpp's log; a traceback when something fails"
    )
    parser.set_defaults(function=run)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """What is asked."""
    group = parser.add_argument_group("prompt (without one: what is piped in)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from stdin")
    source.add_argument("-f", "--file", metavar="FILE", type=Path, help="a file with the prompt")
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message, where there is a chat template")
    group.add_argument(
        "-no-cnv", "--no-conversation", action="store_true", help="continue the text: do not use the chat template"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run."""
    group = parser.add_argument_group("model")
    group.add_argument("--offload", choices=["hobbit", "lru", "none"], default="hobbit", help="default: hobbit")
    group.add_argument("--memory", metavar="SIZE", type=_size, help="budget of the process: 4GiB, 50%%, or bytes")
    group.add_argument("--expert-cache", metavar="SIZE", type=_size, help="of that for experts (default: what is left)")
    group.add_argument(
        "--exact", action="store_true", help="every expert in high precision: the same text as llama.cpp"
    )
    group.add_argument(
        "--precision-rule",
        choices=["miss", "weight"],
        help="low precision on a cache miss (default), or by router weight alone: reproducible",
    )
    group.add_argument("-c", "--ctx-size", metavar="N", type=_whole, default=4096, help="default: 4096; 0: the model's")
    group.add_argument("-t", "--threads", metavar="N", type=_positive, help="threads")
    group.add_argument("-tb", "--threads-batch", metavar="N", type=_positive, help="threads for the prompt")
    group.add_argument("-b", "--batch-size", metavar="N", type=_positive, default=512, help="default: 512")
    group.add_argument("-ub", "--ubatch-size", metavar="N", type=_positive, default=512, help="default: 512")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen. Names and defaults are llama.cpp's."""
    group = parser.add_argument_group("sampling")
    group.add_argument("-n", "--n-predict", metavar="N", type=int, default=-1, help="most tokens; -1: until the end")
    group.add_argument("-s", "--seed", metavar="N", type=int, default=-1, help="-1: random")
    group.add_argument("--temp", metavar="X", type=float, default=0.8, help="default: 0.8; 0: greedy")
    group.add_argument("--top-k", metavar="N", type=int, default=40, help="default: 40; 0: off")
    group.add_argument("--top-p", metavar="X", type=float, default=0.95, help="default: 0.95; 1: off")
    group.add_argument("--min-p", metavar="X", type=float, default=0.05, help="default: 0.05; 0: off")
    group.add_argument("--repeat-penalty", metavar="X", type=float, default=1.0, help="default: 1 (off)")


def run(args: argparse.Namespace) -> int:
    """Answers."""
    import time

    from . import generate as gen

    if args.exact and args.precision_rule is not None:
        raise ValueError("--exact leaves nothing to --precision-rule: give one of them")
    if args.json_stats is not None and not args.json_stats.parent.is_dir():
        raise ValueError(f"{args.json_stats.parent} is not a folder: make it before --json-stats can write there")
    prompt = read_prompt(args)
    start = time.perf_counter()
    model = load_model(args)
    try:
        load_seconds = time.perf_counter() - start
        answer = gen.generate(model, gen.make_request(args, model, prompt), _write)
        report = gen.make_report(str(args.model), load_seconds, answer)
    finally:
        model.close()
    if sys.stdout.isatty():
        _write("\n")
    print("\n" + gen.summary(report), file=sys.stderr)
    if args.json_stats is not None:
        import json

        args.json_stats.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 130 if answer.interrupted else 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt, from wherever it comes."""
    if args.file is not None:
        text = _without_newline(args.file.read_text(encoding="utf-8"))
    elif args.prompt is not None and args.prompt != "-":
        text = args.prompt
    elif args.prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one with -p or -f, or pipe it in")
    else:
        text = _without_newline(sys.stdin.read())
    if not text:
        raise ValueError("the prompt is empty")
    return str(text)


def load_model(args: argparse.Namespace) -> Model:
    """The model behind the arguments."""
    if not args.model.exists():
        raise FileNotFoundError(f"{args.model}: no such file")
    from hobbit_cpp import Llama, OffloadParams

    offload: Any = None
    if args.offload != "none":
        given = {
            "exact": args.exact or None,
            "precision_rule": args.precision_rule,
            "expert_cache": args.expert_cache,
        }
        offload = OffloadParams(mode=args.offload, **{k: v for k, v in given.items() if v is not None})
    model: Any = Llama(
        str(args.model),
        offload=offload,
        memory=args.memory,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        n_threads_batch=args.threads_batch,
        n_batch=args.batch_size,
        n_ubatch=args.ubatch_size,
        verbose=args.verbose,
    )
    return cast("Model", model)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _without_newline(text: str) -> str:
    """As llama.cpp: an editor puts a newline at the end of a file that is not meant."""
    return text[:-1] if text.endswith("\n") else text


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{n} is not a positive number")
    return n


def _whole(text: str) -> int:
    n = int(text)
    if n < 0:
        raise argparse.ArgumentTypeError(f"{n} is negative")
    return n
