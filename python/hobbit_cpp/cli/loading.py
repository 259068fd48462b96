"""Loads a model with a bar on stderr, and with Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .worker import Worker

__all__ = ["load_with_progress"]


def load_with_progress(load: Callable[..., Any], args: argparse.Namespace, worker: Worker) -> Any:
    """The model that `load(args, progress=...)` gives. There is a bar on a terminal, but for --verbose.

    Raises:
        KeyboardInterrupt: Ctrl-C came; nothing stays loaded.
    """
    state = _State()
    with _bar(args.model.name, sys.stderr.isatty() and not args.verbose) as show, worker.stoppable(state.cancel):
        try:
            return worker.do(lambda: state.keep(load(args, progress=state.progress)), lambda: show(state.fraction))
        except KeyboardInterrupt:
            if state.model is not None:  # it came too late to stop
                state.model.close()
            raise


class _State:
    """What the loading thread and the main thread tell each other."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self.model: Any = None
        self._cancelled = False

    def keep(self, model: Any) -> Any:
        self.model = model
        return model

    def progress(self, fraction: float) -> bool:
        self.fraction = fraction
        return not self._cancelled

    def cancel(self) -> None:
        self._cancelled = True


@contextlib.contextmanager
def _bar(name: str, on: bool) -> Iterator[Callable[[float], object]]:
    """A function to call with the fraction that is done."""
    if not on:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"loading {name}", total=1.0)

        def show(fraction: float) -> None:
            if fraction >= 1:  # what follows has no measure
                progress.update(task, description="making the expert pool", total=None)
            else:
                progress.update(task, completed=fraction)

        yield show
