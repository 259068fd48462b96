"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from hobbit_cpp._memory import human

__all__ = ["Progress", "make_progress"]

_LINE_SECONDS = 15.0


class Progress(Protocol):
    """Told how far a conversion is."""

    def update(self, done: int) -> None:
        """`done` bytes of the total were converted."""

    def close(self) -> None:
        """No more updates."""


class _Silent:
    def update(self, done: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._start = self._last = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS or done <= 0:
            return
        self._last = now
        rate = done / (now - self._start)
        left = (self._total - done) / rate
        print(
            f"{done / self._total:4.0%}  {human(done)} of {human(self._total)}, {human(rate)}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        pass


class _Bar:
    """rich's bar."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        self._bar: Any = RichProgress(
            TextColumn("converting"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total)

    def update(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()


def make_progress(show: bool | None, total: int) -> Progress:
    """True: always; False: never; None: only on a terminal."""
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        return _Silent()
    return _Bar(total) if terminal else _Lines(total)
