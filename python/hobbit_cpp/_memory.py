"""How much memory there is, seen through cgroup limits, and how much this process holds. Bytes throughout."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import numbers
import os
import re
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple, Union

from . import _cgroups
from .errors import ParameterError

Size = Union[int, str]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PAGE = os.sysconf("SC_PAGE_SIZE")
# A cgroup without a limit shows a number near 2**63.
_NO_LIMIT = 1 << 60


def parse_size(size: Size, *, of: Optional[int] = None) -> int:
    """ "4GiB", "700MiB", "1.5G", 123456 or, of a whole, "50%" -> bytes. K, M, G, T are powers of 1024 with and without iB;
    KB, MB, GB, TB are powers of 1000.

    Raises:
        ParameterError: not a size, or not positive.
    """
    if isinstance(size, numbers.Integral) and not isinstance(size, bool):
        size = int(size)  # numpy's too
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ParameterError(f"a size is a number of bytes or a text like '4GiB', not {size!r}")
    if isinstance(size, int):
        value = float(min(size, _NO_LIMIT))  # a larger one may be none of the floats
    else:
        text = size.strip()
        percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
        unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B)?", text, re.IGNORECASE)
        if percent and of is not None:
            value = float(percent[1]) / 100 * of
            if float(percent[1]) > 100:
                raise ParameterError(f"'{size}' is more than the whole")
        elif unit:
            decimal = (unit[3] or "").upper() == "B" and unit[2]
            base = _UNITS[unit[2].upper()] if not decimal else 1000 ** "KMGT".index(unit[2].upper()) * 1000
            value = float(unit[1]) * base
        else:
            raise ParameterError(f"'{size}' is not a size: write '4GiB', '700MiB', '50%' or a number of bytes")
    if value < 1:
        raise ParameterError(f"a size must be positive, not {size!r}")
    return int(min(value, _NO_LIMIT))


def human(n: float) -> str:
    """1610612736 -> '1.50 GiB'."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.2f} {unit}" if unit == "GiB" else f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


MOST_THREADS = 512
"""GGML_MAX_N_THREADS: for more ggml ends the process."""


def processors() -> List[int]:
    """Numbers of those that this process may use; of a core with hyper-threads each."""
    return sorted(os.sched_getaffinity(0))


_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cores() -> int:
    """That this process may use: as many threads are best for a model. Hyper-threads of one core would share what it has."""
    return _cores(_TOPOLOGY, tuple(processors()))


@functools.cache  # each command's parser asks, of many processors
def _cores(topology: str, cpus: Tuple[int, ...]) -> int:
    found = set()
    for cpu in cpus:
        try:
            found.add(Path(topology.format(cpu)).read_text(encoding="ascii"))
        except OSError:
            found.add(f"{cpu}")  # one by itself
    return len(found)


def _field(path: str, name: str) -> int:
    """A `Name:  123 kB` line of a /proc file, in bytes; 0 when there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def resident() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * _PAGE


def give_back() -> None:
    """Returns what was freed to the system. glibc keeps some 50 MB of a closed model, which the next one would be short of."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def large_blocks_apart() -> None:
    """From now on glibc takes blocks of 4 MiB and more from the system and gives them back when they are freed.

    By itself it does so only until the first such block is freed, then below 32 MiB they come from its heap, where what one model
    leaves is in pieces that the next does not fit into: 15 to 30 MB more for a second model in a process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD


def peak_resident() -> int:
    """The most this process ever held."""
    return _field("/proc/self/status", "VmHWM")


def forget_peak() -> None:
    """From now on `peak_resident` is of what is held from now on, where the kernel can forget."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class CgroupLimit(NamedTuple):
    """A memory limit that holds for this process."""

    path: Path
    limit: int
    used: int  # without what the kernel gives back by itself: file pages


def _read_int(path: Path) -> Optional[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_pages(stat: Path, names: List[str]) -> int:
    total = 0
    try:
        for line in stat.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            total += int(value) if name in names else 0
    except (OSError, ValueError):
        return 0
    return total


def cgroup_limits() -> List[CgroupLimit]:
    """All memory limits above this process."""
    out = []
    for folder in _cgroups.folders("memory"):
        limit = _read_int(folder / "memory.max")
        used = _read_int(folder / "memory.current")
        names = ["inactive_file", "active_file"]
        if limit is None:
            limit = _read_int(folder / "memory.limit_in_bytes")
            used = _read_int(folder / "memory.usage_in_bytes")
            names = ["total_inactive_file", "total_active_file"]
        if limit is not None and limit < _NO_LIMIT and used is not None:
            out.append(CgroupLimit(folder, limit, max(0, used - _file_pages(folder / "memory.stat", names))))
    return out


def machine() -> Tuple[int, int]:
    """What is free (page cache counts as free) and all there is, of the machine; 0 where it is not known."""
    return _field("/proc/meminfo", "MemAvailable"), _field("/proc/meminfo", "MemTotal")


def total() -> int:
    """Memory of the machine or of the tightest cgroup, whichever is less."""
    return min([_field("/proc/meminfo", "MemTotal"), *(c.limit for c in cgroup_limits())])


def available() -> int:
    """What could still be allocated without swapping or hitting a cgroup limit."""
    free = _field("/proc/meminfo", "MemAvailable")
    return max(0, min([free, *(c.limit - c.used for c in cgroup_limits())]))


def default_budget() -> int:
    """What the process may take when nobody says: what it has and most of what is free.

    The rest is for the page cache and for other programs: an engine that takes all of memory is the first victim of the
    kernel, and a machine that swaps is slower than a smaller cache.
    """
    free = available()
    return resident() + max(free // 2, min(free * 4 // 5, free - (2 << 30)))
