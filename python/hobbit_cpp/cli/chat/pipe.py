"""The chat in a pipe: a message a line in, an answer a line out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Optional

from ..._texts import decoded
from ..output import one_line, write_stdout
from . import commands
from .session import Chat, TooLongError, Turn

__all__ = ["Pipe", "converse"]


class Pipe:
    """Answers to stdout, all else to stderr."""

    def __init__(self) -> None:
        self.failed = False
        self.interrupted = False
        self._begun = False

    def text(self, piece: str) -> None:
        write_stdout(piece)

    def note(self, text: str) -> None:
        for line in text.splitlines():
            print(f"hobbit: {line}".rstrip(), file=sys.stderr, flush=True)

    def reading(self, done: int, total: int) -> None:
        pass

    def answer(self, work: Callable[[], Optional[Turn]]) -> None:
        try:
            turn = work()
        except TooLongError as e:
            # the others can be answered nevertheless, each in its line
            self.note(one_line(e))
            self.failed = True
        else:
            self.interrupted = turn is not None and turn.answer.interrupted
        write_stdout("\n")


def converse(chat: Chat, pipe: Pipe, lines: Iterable[bytes], first: str | None) -> int:
    """Answers each line; the exit code.

    Raises:
        ValueError: a line is not UTF-8, or a command is wrong.
        HobbitError, ...: the model failed.
    """
    if first is not None:
        message = first.strip()
        pipe.answer(lambda: chat.send(message, pipe))
    for number, raw in enumerate(lines, 1):
        if pipe.interrupted:
            break
        line = decoded(raw, f"line {number} of the input").rstrip()
        if not line:
            continue
        if not commands.is_command(line):
            message = line.strip()
            pipe.answer(lambda text=message: chat.send(text, pipe))  # type: ignore[misc]
            continue
        command, argument = commands.find(line)
        if not command.run(chat, pipe, argument):
            break
    if pipe.interrupted:
        return 130
    return 1 if pipe.failed else 0
