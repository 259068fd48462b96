"""A memory cgroup for processes of a test."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Callable, Iterator, Optional

import pytest


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    root = Path("/sys/fs/cgroup/memory")
    folder = root / f"hobbit-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as e:
        pytest.skip(f"no memory cgroup may be made here: {e}")
    try:
        yield folder
    finally:
        folder.rmdir()


def entering(cgroup: Optional[Path]) -> Callable[[], None]:
    """For a child process: the first thing it does is to enter the cgroup."""

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return enter
