"""SIGINT, which is not to be lost, and SIGTERM, for commands that have something to put in order before they end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from hobbit_cpp._log import CALLBACKS

__all__ = ["sigint_is_heard", "sigterm_exits"]

_AGAIN_SECONDS = 0.02


@contextlib.contextmanager
def sigint_is_heard() -> Iterator[None]:
    """KeyboardInterrupt as ever, but a moment later where Python would print it and go on: in callbacks of C, in __del__."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else's, or ignored
        return
    try:
        signal.signal(signal.SIGINT, _interrupted)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _is_lost(frame):
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    else:
        raise KeyboardInterrupt


def _is_lost(frame: FrameType | None) -> bool:
    """Whether an exception that is raised here reaches nobody."""
    while frame is not None:
        code = frame.f_code
        # the last: modules' locks, of which an import has many
        of_imports = code.co_name == "cb" and code.co_filename.startswith("<frozen importlib")
        if code in CALLBACKS or code.co_name == "__del__" or of_imports:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """The first SIGTERM, with which a batch system stops, raises SystemExit inside; what is put in order then is not disturbed by
    another. Other threads than the main one hear no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
