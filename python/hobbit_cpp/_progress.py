"""How far something long is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Optional

from ._memory import human

__all__ = ["Phases", "StepProgress", "make_progress"]

_LINE_SECONDS = 15.0
_BYTES = "bytes"


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
        how_far = f"{human(done)} of {human(total)}, {human(rate)}/s"
        if self._unit != _BYTES:
            how_far = f"{done} of {total} {self._unit}, {rate:.1f}/s"
        print(f"{self._doing}: {how_far}, {(total - done) / rate:.0f} s left", file=sys.stderr, flush=True)


class _Bar(StepProgress):
    def __init__(self, doing: str, unit: str) -> None:
        from rich import progress
        from rich.console import Console

        numbers: Any = (progress.MofNCompleteColumn(), progress.TextColumn(unit))
        if unit == _BYTES:
            numbers = (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
        self._bar = progress.Progress(
            progress.TextColumn(doing),
            progress.BarColumn(),
            *numbers,
            progress.TimeRemainingColumn(),
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


def make_progress(doing: str, unit: str, show: Optional[bool] = True) -> StepProgress:
    """For what is `doing` something in steps of one `unit` each, "bytes" or another. `show`: None: only on a terminal."""
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        return StepProgress()
    return _Bar(doing, unit) if terminal else _Lines(doing, unit)


class Phases:
    """Of what does several things after one another: a `StepProgress` for each."""

    def __init__(self, show: Optional[bool] = True) -> None:
        self._show = show
        self._doing = ""
        self._steps: Optional[StepProgress] = None

    def update(self, doing: str, unit: str, done: int, total: int) -> None:
        """`done` of `total` steps of what is being done are done."""
        if doing != self._doing or self._steps is None:
            self.close()
            self._doing, self._steps = doing, make_progress(doing, unit, self._show)
        self._steps.update(done, total)

    def close(self) -> None:
        """No more updates."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
