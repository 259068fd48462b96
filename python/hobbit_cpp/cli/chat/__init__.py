"""hobbit chat: a conversation with a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._texts import checked, read_whole
from ..options import (
    add_json_stats_flag,
    add_model_flags,
    add_sampling_flags,
    check_json_stats,
    check_model_flags,
    load_model,
    sampling_of,
)

if TYPE_CHECKING:
    from .session import Chat

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation. In a terminal with line editing and commands (/help lists them); of what is piped in, "
        "each line is a message, and stdout gets the answers.",
    )
    group = parser.add_argument_group("chat")
    source = group.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help="a first message")
    source.add_argument("-f", "--file", metavar="FILE", type=Path, help="a file with a first message")
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message")
    group.add_argument(
        "-no-cnv",
        "--no-conversation",
        action="store_true",
        help="continue each text as it is: no chat template, no history",
    )
    group.add_argument("--load", metavar="FILE", type=Path, help="go on with a conversation of /save")
    group.add_argument("--no-history", action="store_true", help="do not keep what is typed for later sessions")
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_json_stats_flag(parser)
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Talks."""
    import time

    from ..loading import load_with_progress
    from ..output import write_json
    from ..signals import sigterm_exits
    from ..worker import Worker
    from .conversation import Conversation, load
    from .session import Chat
    from .template import PlainText, Template

    check_model_flags(args)
    check_json_stats(args)
    if args.no_conversation and (args.system_prompt or args.load):
        flag = "--system-prompt" if args.system_prompt else "--load"
        raise ValueError(f"{flag} needs the chat template, which --no-conversation leaves out")
    first = read_whole(args.file) if args.file is not None else checked(args.prompt, "-p") if args.prompt is not None else None
    if args.system_prompt is not None:
        args.system_prompt = checked(args.system_prompt, "-sys")
    if first is not None and not first.strip():
        raise ValueError("the first message is empty")
    talk = load(args.load) if args.load is not None else Conversation()
    talk.system = args.system_prompt or talk.system
    # before the model, since the memory budget covers these modules too
    terminal = _terminal(args) if _is_interactive() else None

    start = time.perf_counter()
    with contextlib.closing(Worker()) as worker, contextlib.closing(load_with_progress(load_model, args, worker)) as model:
        load_seconds = time.perf_counter() - start
        template = PlainText(model) if args.no_conversation else Template(model)
        chat = Chat(
            model,
            template,
            worker,
            lambda attempt: _sampling(args, attempt),
            offload=model.offloaded,
            history=not args.no_conversation,
            conversation=talk,
        )
        try:
            with sigterm_exits():  # the terminal gets back its echo, and the statistics are written
                return _talk(chat, terminal, first, args)
        finally:
            if args.json_stats is not None:
                write_json(args.json_stats, _report(str(args.model), load_seconds, chat))


def _is_interactive() -> bool:
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def _terminal(args: argparse.Namespace) -> Any:
    from .terminal import Terminal, history_file

    return Terminal(None if args.no_history else history_file())


def _talk(chat: Chat, terminal: Any, first: str | None, args: argparse.Namespace) -> int:
    if terminal is None:
        from .pipe import Pipe, converse

        pipe = Pipe()
        if chat.template.note:
            pipe.note(chat.template.note)
        return converse(chat, pipe, sys.stdin.buffer, first)
    from .terminal import interact

    terminal.note(f"{args.model.name}: {chat.n_ctx} tokens of context. /help lists commands, Ctrl-D leaves")
    if chat.template.note:
        terminal.note(chat.template.note)
    return interact(chat, terminal, first)


def _sampling(args: argparse.Namespace, attempt: int) -> dict[str, Any]:
    """A retry with a fixed seed is not the same answer again."""
    sampling = sampling_of(args)
    if args.seed >= 0:
        sampling["seed"] = args.seed + attempt
    return sampling


def _report(path: str, load_seconds: float, chat: Chat) -> dict[str, Any]:
    from ..generate import answer_report, peak_memory

    turns = [{**answer_report(t.answer), "reused": t.reused, "context": t.context} for t in chat.turns]
    return {
        "model": path,
        "load_seconds": load_seconds,
        "turns": turns,
        "peak_memory": peak_memory(*(t.answer for t in chat.turns)),
    }
