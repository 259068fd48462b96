"""Progress of long loops: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number of each step when it is done."""
    try:
        from rich.progress import Progress, TimeElapsedColumn
    except ImportError:
        rich = False
    else:
        rich = sys.stderr.isatty()
    if rich:
        from rich.console import Console

        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda _step: bar.advance(task)
        return
    begin = time.monotonic()
    every = max(1, total // 10)

    def line(step: int) -> None:
        if (step + 1) % every == 0 or step + 1 == total:
            passed = time.monotonic() - begin
            print(f"{title}: {step + 1}/{total}, {passed:.0f} s", file=sys.stderr)
            sys.stderr.flush()

    yield line
