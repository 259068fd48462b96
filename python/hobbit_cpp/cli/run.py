"""hobbit run: answers one prompt."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from .._texts import checked, decoded, read_whole
from .options import (
    add_json_stats_flag,
    add_model_flags,
    add_sampling_flags,
    check_json_stats,
    check_model_flags,
    load_model,
)
from .output import write_json, write_stdout

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="answer a prompt",
        description="Streams the answer to a prompt to stdout, then a summary to stderr.",
    )
    add_prompt_flags(parser)
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_json_stats_flag(parser)
    parser.add_argument(
        "--record", action="store_true", help="with --json-stats: time line, memory and reuse too, for hobbit report"
    )
    parser.set_defaults(function=run)


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked."""
    group = parser.add_argument_group("prompt (without one: what is piped in)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from stdin")
    source.add_argument("-f", "--file", metavar="FILE", type=Path, help="a file with the prompt")
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message, where there is a chat template")
    group.add_argument(
        "-no-cnv", "--no-conversation", action="store_true", help="continue the text: do not use the chat template"
    )


def run(args: argparse.Namespace) -> int:
    """Answers."""
    import time

    from . import generate as gen
    from .loading import load_with_progress
    from .worker import Worker

    check_model_flags(args)
    check_json_stats(args)
    if args.record and (args.json_stats is None or args.offload == "none"):
        raise ValueError("--record goes into --json-stats FILE, and needs the engine (no --offload none)")
    prompt = read_prompt(args)
    start = time.perf_counter()
    with contextlib.closing(Worker()) as worker, contextlib.closing(load_with_progress(load_model, args, worker)) as model:
        load_seconds = time.perf_counter() - start
        if args.record:
            model.start_recording()
        answer = gen.generate(model, gen.make_request(args, model, prompt), write_stdout, worker=worker)
        report = gen.make_report(str(args.model), load_seconds, answer)
        if args.json_stats is not None and args.offload != "none":
            report["experts"] = model.expert_uses()
        if args.record:
            report["recording"] = model.recording()
    if sys.stdout.isatty():
        write_stdout("\n")
    print("\n" + gen.summary(report), file=sys.stderr)
    if args.json_stats is not None:
        write_json(args.json_stats, report)
    return 130 if answer.interrupted else 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt, from wherever it comes."""
    if args.file is not None:
        text = _without_newline(read_whole(args.file))
    elif args.prompt is not None and args.prompt != "-":
        text = checked(args.prompt, "-p")
    elif args.prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one with -p or -f, or pipe it in")
    else:
        text = _without_newline(decoded(sys.stdin.buffer.read(), "stdin"))
    if not text:
        raise ValueError("the prompt is empty")
    if args.system_prompt is not None:
        args.system_prompt = checked(args.system_prompt, "-sys")
    return str(text)


def _without_newline(text: str) -> str:
    """As llama.cpp: an editor puts a newline at the end of a file that is not meant."""
    return text[:-1] if text.endswith("\n") else text
