"""When the machine, or a cgroup of this process, gets short of memory, the expert pool gives some back, and takes it again later.

A pool is the cheapest memory there is to give: what it held can be read again. A thread looks once a second, and ten times a
second while memory is scarce, since another program can take a gigabyte in a second.

*Short* is a domain (the machine, or a memory cgroup) of which

- less than the reserve is free: 5 % of it, at most 1 GiB. Below that the kernel is about to take the page cache of other programs
  away (its own watermarks are at 1 to 2 %). Where the budget was fitted closely into a cgroup, less than that is free from the
  beginning, and nothing is wrong: then the reserve is half of what the budget leaves there, at least 4 MiB;
- or less than four times the reserve, while some task waited for memory for 10 % of the last 10 s (PSI `some avg10`). PSI alone
  is no reason: that of the machine is high as well when somebody else's small cgroup is too small for what runs in it.

Page cache counts as free, as in MemAvailable: the kernel takes it when it needs it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Mapping, NamedTuple, Optional

from . import _memory
from .errors import HobbitError

__all__ = ["Monitor", "Reading", "Yielding", "read_all"]

STEPS = 8
"""In so many steps the pool would be gone: an eighth is 1 GiB of 8, and little enough to lose by mistake."""
CALM_SECONDS = 20.0
"""Without shortage, before the pool grows: twice the time over which PSI is averaged."""
GROW_SECONDS = 5.0
"""Between two steps of growing, in which what they led to is seen."""

_RESERVE_SHARE = 0.05
_MOST_RESERVE = 1 << 30
_LEAST_RESERVE = 4 << 20
_STALLED = 10.0
_LOOK_SECONDS = 1.0
_SCARCE_SECONDS = 0.1


class Reading(NamedTuple):
    """Memory of a domain, in bytes: what could still be taken, and all of it. `stalled`: PSI some avg10, in percent."""

    free: int
    total: int
    stalled: float = 0.0


class Yielding:
    """Decides how large the pool may be.

    Args:
        readings: the domains at the beginning, by name.
        to_come: bytes that the process may still come to take within its budget.
        floor: where shrinking ends.
    """

    def __init__(self, readings: Mapping[str, Reading], to_come: int, floor: int) -> None:
        self.floor = floor
        self._reserves: Dict[str, float] = {}
        self._calm_from: Optional[float] = None
        for name, r in readings.items():
            self._reserves[name] = min(self._reserve(name, r), max(_LEAST_RESERVE, (r.free - to_come) / 2))

    def _reserve(self, name: str, r: Reading) -> float:
        return self._reserves.get(name, min(_RESERVE_SHARE * r.total, _MOST_RESERVE))

    def scarce(self, readings: Mapping[str, Reading]) -> bool:
        """Whether to look more often."""
        return any(r.free < 2 * self._reserve(name, r) for name, r in readings.items())

    def _short(self, name: str, r: Reading) -> bool:
        reserve = self._reserve(name, r)
        return r.free < reserve or (r.stalled >= _STALLED and r.free < 4 * reserve)

    def look(self, readings: Mapping[str, Reading], pool: int, whole: int, now: float) -> int:
        """The size that the pool should have now.

        Args:
            pool: that it has; whole: that it was given; both in bytes.
            now: seconds on any clock.
        """
        step = max(whole // STEPS, 1)
        if any(self._short(name, r) for name, r in readings.items()):
            self._calm_from = None
            return max(pool - step, min(self.floor, pool))
        # Not so close that a step would be given back at once.
        room = all(r.free > 2 * self._reserve(name, r) + step and r.stalled < _STALLED / 2 for name, r in readings.items())
        if not room:
            self._calm_from = None
        elif self._calm_from is None:
            self._calm_from = now
        elif pool < whole and now - self._calm_from >= CALM_SECONDS:
            self._calm_from = now - CALM_SECONDS + GROW_SECONDS
            return min(pool + step, whole)
        return pool


def _stalled(path: Path) -> float:
    """`some avg10` of a PSI file; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float(path.read_text(encoding="ascii").split("avg10=", 1)[1].split(None, 1)[0])
    return 0.0


def read_all() -> Dict[str, Reading]:
    """The machine and each memory cgroup with a limit that this process is in, as they are now."""
    free, total = _memory.machine()
    out = {"": Reading(free, total, _stalled(Path("/proc/pressure/memory")))} if total else {}
    for c in _memory.cgroup_limits():
        out[str(c.path)] = Reading(max(0, c.limit - c.used), c.limit, _stalled(c.path / "memory.pressure"))
    return out


class Monitor:
    """The thread.

    Args:
        pool: the size of the pool now; whole: the one that it was given.
        resize: gives it another.
        yielding: the decision.
        readings: for tests.
    """

    def __init__(
        self,
        pool: Callable[[], int],
        whole: Callable[[], int],
        resize: Callable[[int], None],
        yielding: Yielding,
        readings: Callable[[], Dict[str, Reading]] = read_all,
    ) -> None:
        self.shrinks = self.grows = 0
        self._pool, self._whole, self._resize = pool, whole, resize
        self._yielding, self._readings = yielding, readings
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hobbit-yield", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread: then nothing is given back
            self._thread.start()

    def _run(self) -> None:
        wait = _LOOK_SECONDS
        while not self._end.wait(wait):
            readings = self._readings()
            wait = _SCARCE_SECONDS if self._yielding.scarce(readings) else _LOOK_SECONDS
            try:
                before = self._pool()
                wanted = self._yielding.look(readings, before, self._whole(), time.monotonic())
                if wanted != before:
                    self._resize(wanted)
            except HobbitError:
                continue  # no memory to grow into, or the model is being closed
            self.shrinks += wanted < before
            self.grows += wanted > before

    @property
    def ending(self) -> bool:
        return self._end.is_set()

    def end(self) -> None:
        """Returns when the thread is gone."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
