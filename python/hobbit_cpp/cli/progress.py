"""How far a command is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Optional

__all__ = ["StepProgress", "make_progress"]

_LINE_SECONDS = 15.0


class StepProgress:
    """Told how many steps of how many are done. This one says nothing."""

    def update(self, done: int, total: int) -> None:
        """`done` of `total` steps are done."""

    def close(self) -> None:
        """No more updates."""


class _Lines(StepProgress):
    def __init__(self, doing: str, unit: str) -> None:
        self._doing, self._unit = doing, unit
        self._start = self._last = time.monotonic()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS or done <= 0:
            return
        self._last = now
        rate = done / (now - self._start)
        print(
            f"{self._doing}: {done} of {total} {self._unit}, {rate:.1f}/s, {(total - done) / rate:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


class _Bar(StepProgress):
    def __init__(self, doing: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar: Any = Progress(
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task: Optional[Any] = None

    def update(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._bar.stop()


def make_progress(doing: str, unit: str, show: bool = True) -> StepProgress:
    """For a command that is `doing` something in steps of one `unit` each."""
    if not show:
        return StepProgress()
    return _Bar(doing, unit) if sys.stderr.isatty() else _Lines(doing, unit)
