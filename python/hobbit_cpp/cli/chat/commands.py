"""What begins with a slash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

from . import conversation as files
from .session import Chat, Listener, Turn
from .status import details

__all__ = ["COMMANDS", "Command", "Console", "find", "is_command"]


class Console(Listener, Protocol):
    """Where commands speak, and let the model speak."""

    def answer(self, work: Callable[[], Optional[Turn]]) -> None:
        """Shows the answer that `work` gets, and what goes wrong with it."""


@dataclass(frozen=True)
class Command:
    """A command; `run` gets what stands behind its name. Returns whether the chat goes on."""

    name: str
    argument: str
    help: str
    run: Callable[[Chat, Console, str], bool]


def is_command(line: str) -> bool:
    """Whether the line begins with the name of a command."""
    return line.startswith("/") and _split(line)[0] in COMMANDS


def find(line: str) -> tuple[Command, str]:
    """The command of a line that begins with a slash, and its argument.

    Raises:
        ValueError: there is no such command.
    """
    name, argument = _split(line)
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name}: /help lists them; a space before the slash makes it a message")
    command = COMMANDS[name]
    if argument and not command.argument:
        raise ValueError(f"{name} takes nothing more")
    return command, argument


def _split(line: str) -> tuple[str, str]:
    name, *rest = line.split(None, 1)
    return name, rest[0].strip() if rest else ""


def _help(chat: Chat, console: Console, argument: str) -> bool:
    width = max(len(f"{c.name} {c.argument}") for c in COMMANDS.values())
    lines = [f"{c.name + ' ' + c.argument:<{width}}  {c.help}" for c in COMMANDS.values()]
    lines += [
        "",
        "Alt-Enter, or a backslash at the end of a line, begins a new line; pasted text stays one message.",
        "Ctrl-C stops the answer. At the empty prompt Ctrl-C twice, or Ctrl-D, leaves.",
    ]
    console.note("\n".join(lines))
    return True


def _stats(chat: Chat, console: Console, argument: str) -> bool:
    console.note(details(chat))
    return True


def _reset(chat: Chat, console: Console, argument: str) -> bool:
    chat.conversation.reset()
    console.note("the conversation begins anew" + (", with the system message" if chat.conversation.system else ""))
    return True


def _system(chat: Chat, console: Console, argument: str) -> bool:
    talk = chat.conversation
    if not argument:
        console.note(f"the system message is: {talk.system}" if talk.system else "there is no system message")
    elif not chat.history:
        raise ValueError("a system message needs the chat template, which --no-conversation leaves out")
    elif argument in ('""', "''"):
        talk.system = None
        console.note("no system message from now on")
    else:
        talk.system = argument
        console.note("the system message holds from the next message on")
    return True


def _save(chat: Chat, console: Console, argument: str) -> bool:
    path = _path(argument, "/save")
    files.save(path, chat.conversation, Path(chat.model.model_path).name)
    console.note(f"saved: {path}")
    return True


def _load(chat: Chat, console: Console, argument: str) -> bool:
    if not chat.history:
        raise ValueError("/load needs the history, which --no-conversation leaves out")
    path = _path(argument, "/load")
    chat.conversation = files.load(path)
    n = len(chat.conversation.messages)
    waiting = "; the last one has no answer yet: /retry asks for it" if chat.conversation.unanswered is not None else ""
    console.note(f"{n} messages of {path}{waiting}")
    return True


def _retry(chat: Chat, console: Console, argument: str) -> bool:
    if not chat.conversation.messages and chat.conversation.unanswered is None:
        raise ValueError("there is no message to answer again")
    console.answer(lambda: chat.retry(console))
    return True


def _exit(chat: Chat, console: Console, argument: str) -> bool:
    return False


def _path(argument: str, name: str) -> Path:
    """A file name, quoted or not."""
    if not argument:
        raise ValueError(f"{name} needs the name of a file")
    if argument[0] in "'\"":
        try:
            words = shlex.split(argument)
        except ValueError as e:
            raise ValueError(f"{name} {argument}: {e}") from None
        if len(words) == 1:
            argument = words[0]
    return Path(argument).expanduser()


COMMANDS: dict[str, Command] = {
    c.name: c
    for c in (
        Command("/help", "", "this list", _help),
        Command("/stats", "", "speed, cache, context and memory", _stats),
        Command("/retry", "", "another answer to the last message", _retry),
        Command("/reset", "", "forget the conversation, not the system message", _reset),
        Command("/system", "[TEXT]", 'set the system message, or show it; "" removes it', _system),
        Command("/save", "FILE", "write the conversation as JSON", _save),
        Command("/load", "FILE", "go on with a saved conversation", _load),
        Command("/exit", "", "leave", _exit),
    )
}
