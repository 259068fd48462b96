"""SIGTERM, for commands that have something to put in order before they end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["sigterm_exits"]


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
