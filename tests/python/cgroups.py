"""A memory cgroup for processes of a test."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Callable, Iterator, Optional

import pytest

from hobbit_cpp.bench import conditions


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """Of either version. Skips where none may be made."""
    with conditions.memory_cgroup(limit) as cap:
        if cap.folder is None:
            pytest.skip(cap.how)
        yield cap.folder


def oom_kills(cgroup: Path) -> int:
    """Processes of it that the kernel ended because its memory was used up."""
    for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
        with contextlib.suppress(FileNotFoundError):
            fields = dict(line.split() for line in (cgroup / name).read_text().splitlines())
            return int(fields["oom_kill"])
    raise AssertionError(f"{cgroup} does not say what was killed")


def entering(cgroup: Optional[Path]) -> Callable[[], None]:
    """For a child process: the first thing it does is to enter the cgroup."""

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return enter
