"""The control groups that this process is in, version 1 or 2, and what they allow it of a disk."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Iterator, Optional, Set, Union

_ROOT = Path("/sys/fs/cgroup")
_DEVICES = Path("/sys/dev/block")


def folders(controller: str) -> Iterator[Path]:
    """From the process's own up to the root, of the hierarchies with this controller ("memory", "blkio") and of version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in [_ROOT / controller] if controllers else [_ROOT, _ROOT / "unified"]:
            folder = root / path.lstrip("/")
            # In a container the path may be that of the host, and the root the container's own group.
            candidates = [folder, *folder.parents] if folder.is_dir() else [root]
            for candidate in candidates:
                if candidate == root or root in candidate.parents:
                    yield candidate


def read_limit(path: Union[str, os.PathLike[str]]) -> Optional[int]:
    """Bytes a second that may be read from the disk of this file; None: no limit."""
    with contextlib.suppress(OSError):
        devices = _devices(os.stat(path).st_dev)
        limits = [*_limits("blkio", "blkio.throttle.read_bps_device", devices), *_limits("io", "io.max", devices)]
        return min(limits, default=None)
    return None


def _devices(number: int) -> Set[str]:
    """A device and, if it is a partition, the disk it is on, as "major:minor"."""
    name = f"{os.major(number)}:{os.minor(number)}"
    out = {name}
    with contextlib.suppress(OSError):
        folder = (_DEVICES / name).resolve(strict=True)
        if (folder / "partition").exists():
            out.add((folder.parent / "dev").read_text(encoding="ascii").strip())
    return out


def _limits(controller: str, file: str, devices: Set[str]) -> Iterator[int]:
    for folder in folders(controller):
        with contextlib.suppress(OSError):
            for line in (folder / file).read_text(encoding="ascii").splitlines():
                device, _, rest = line.partition(" ")
                limit = re.search(r"rbps=(\d+)|^(\d+)$", rest)
                if device in devices and limit:
                    yield int(limit[1] or limit[2])
