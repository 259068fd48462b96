"""The chat in a terminal: line editing, colours, a status line."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from ..output import debugging, one_line, write_stdout
from . import commands
from .session import Chat, Turn
from .status import status_parts

__all__ = ["Terminal", "history_file", "interact"]

# A second Ctrl-C so soon after the one that stopped an answer was meant for that answer too.
_HASTE_SECONDS = 0.5
# A prompt that takes longer shows how far it is.
_PATIENCE_SECONDS = 1.0

_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def history_file() -> Path:
    """Where the lines of earlier sessions are kept."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    folder = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.local/state"))
    return folder / "hobbit-cpp" / "chat-history"


class Terminal:
    """Reads lines, shows answers on stdout and all else on stderr."""

    def __init__(self, history: Path | None) -> None:
        self._chat: Chat | None = None
        self._session = _prompt_session(history, self.error, self._forget_ctrl_c)
        self._colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._column_zero = True
        self._waiting_since: float | None = None
        self._shows_reading = False
        self._ctrl_c_before = False  # the last key was one
        self._stopped_at = float("-inf")

    def attach(self, chat: Chat) -> None:
        """The chat whose status is shown."""
        self._chat = chat

    def read(self) -> str:
        """A message or a command, edited.

        Raises:
            KeyboardInterrupt: Ctrl-C, and nothing was typed.
            EOFError: Ctrl-D.
        """
        line = str(self._session.prompt())
        self._forget_ctrl_c()
        return _valid(line)

    def wants_to_leave(self) -> bool:
        """Whether this Ctrl-C at the empty prompt, after another one, is meant for the program."""
        if time.monotonic() - self._stopped_at < _HASTE_SECONDS:
            return False
        if not self._ctrl_c_before:
            self.note("Ctrl-C again, or Ctrl-D, leaves")
            self._ctrl_c_before = True
            return False
        return True

    def _forget_ctrl_c(self) -> None:
        self._ctrl_c_before, self._stopped_at = False, float("-inf")

    # ---- what a turn and commands say ----

    def text(self, piece: str) -> None:
        self._end_reading()
        piece = _printable(piece) if sys.stdout.isatty() else piece
        if piece:
            write_stdout(piece)
            self._column_zero = piece.endswith("\n")

    def note(self, text: str) -> None:
        self._say(text, _DIM)

    def error(self, text: str) -> None:
        """Something failed; the chat goes on."""
        self._say(text, _RED)

    def reading(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since >= _PATIENCE_SECONDS and sys.stderr.isatty():
            self._shows_reading = True
            text = f"reading {done} of {total} tokens, {now - self._waiting_since:.0f} s"[: _width() - 1]
            sys.stderr.write(f"\r\x1b[K{_DIM}{text}{_PLAIN}" if self._colour else f"\r{text}")
            sys.stderr.flush()

    def answer(self, work: Callable[[], Optional[Turn]]) -> None:
        self._waiting_since = None
        turn: Turn | None = None
        try:
            with _no_echo():
                turn = work()
        except Exception as e:
            if debugging():
                import traceback

                self._say(traceback.format_exc().rstrip(), _RED)
            self.error(one_line(e))
        finally:
            self._end_reading()
            self._end_line()
        if turn is None or self._chat is None:
            return
        if turn.answer.interrupted:
            self._ctrl_c_before, self._stopped_at = True, time.monotonic()
            self.note("stopped" if turn.text else "stopped before the answer began: /retry sends the message again")
        elif not turn.text.strip():
            self.note("(an empty answer)")
        self.note(fit(status_parts(self._chat, turn), _width()))

    def _say(self, text: str, style: str) -> None:
        self._end_reading()
        self._end_line()
        lines = [textwrap.fill(line, _width() - 1, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")]
        text = "\n".join(lines)
        print(f"{style}{text}{_PLAIN}" if self._colour else text, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if not self._column_zero:
            write_stdout("\n")
            self._column_zero = True

    def _end_reading(self) -> None:
        if self._shows_reading:
            sys.stderr.write("\r\x1b[K" if self._colour else "\r" + " " * (_width() - 1) + "\r")
            sys.stderr.flush()
            self._shows_reading = False


def interact(chat: Chat, terminal: Terminal, first: str | None) -> int:
    """Lines and answers, until the user leaves; the exit code."""
    terminal.attach(chat)
    while True:
        try:
            # a first message is no command, whatever it begins with
            line, first = (terminal.read(), None) if first is None else (" " + first, None)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if terminal.wants_to_leave():
                return 0
            continue
        if not line.strip():
            continue
        try:
            if not _handle(chat, terminal, line):
                return 0
        except (ValueError, OSError) as e:
            terminal.error(one_line(e))
        except KeyboardInterrupt:
            terminal.note("stopped")


def _handle(chat: Chat, terminal: Terminal, line: str) -> bool:
    """Whether the chat goes on."""
    if line.startswith("/"):
        command, argument = commands.find(line)
        return command.run(chat, terminal, argument)
    terminal.answer(lambda: chat.send(line.strip(), terminal))
    return True


def fit(parts: list[str], width: int) -> str:
    """As many of the parts as a line of that width has room for, at least one."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(part) + 3 > width - 1:
            break
        text += " · " + part
    return text


def _width() -> int:
    """Columns of the terminal that is spoken to; stdout may be a file."""
    try:
        return max(os.get_terminal_size(sys.stderr.fileno()).columns, 2)
    except (OSError, ValueError):
        return max(shutil.get_terminal_size().columns, 2)


def _printable(text: str) -> str:
    """Without what would steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _valid(text: str) -> str:
    """Bytes that a terminal sent and that are no text become question marks."""
    return text.encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed during an answer does not show in it; it stands at the next prompt."""
    import termios

    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):
        yield
        return
    during = [*before]
    during[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, during)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def _prompt_session(history: Path | None, complain: Callable[[str], None], cleared: Callable[[], None]) -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # typed while the model spoke
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=Condition(lambda: bool(session.default_buffer.text)))
    def _(event: Any) -> None:
        event.current_buffer.reset()
        cleared()

    class Commands(WordCompleter):
        """Only where a command may stand: at the beginning."""

        def get_completions(self, document: Document, event: Any) -> Any:
            if document.text_before_cursor.startswith("/") and " " not in document.text_before_cursor:
                yield from super().get_completions(document, event)

    class Lines(FileHistory):
        """A full disk is no reason to end a conversation."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(_valid(string))

    words = {c.name: f"{c.argument} {c.help}".strip() for c in commands.COMMANDS.values()}
    session: Any = PromptSession(
        FormattedText([("class:prompt", "> ")]),
        multiline=True,
        key_bindings=keys,
        history=InMemoryHistory(),
        completer=Commands(list(words), meta_dict=words, sentence=True),
        complete_while_typing=False,
        prompt_continuation=lambda width, line, wrapped: "" if wrapped else "· ",
        style=Style.from_dict({"prompt": "bold ansigreen"}),
        enable_open_in_editor=True,
        enable_suspend=True,
        output=create_output(always_prefer_tty=True),
    )
    if history is not None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(history, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
            session.history = session.default_buffer.history = Lines(str(history))
        except OSError as e:
            complain(f"no history is kept: {one_line(e)}")
    return session
