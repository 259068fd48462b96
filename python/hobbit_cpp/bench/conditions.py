"""What a run happens under, and what is said about it beside the figures.

Every setting is tried, not demanded: where it may not be changed the reason is kept, and the row says so.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, List, Optional

__all__ = ["Cap", "drop_caches", "get_read_ahead", "memory_cgroup", "read_ahead", "under_cgroup"]

_CGROUPS = Path("/sys/fs/cgroup")


# ---- memory ----


@dataclass
class Cap:
    """A memory cgroup, or why there is none.

    Attributes:
        folder: None: not capped.
        how: "cgroup v1", "cgroup v2", or the reason why there is no cap.
    """

    folder: Optional[Path]
    how: str

    def peak(self) -> Optional[int]:
        """The most that it ever held, page cache included, in bytes."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError, ValueError):
                if self.folder is not None:
                    return int((self.folder / name).read_text())
        return None

    def kills(self) -> int:
        """Processes that were killed for going beyond it."""
        for name, key in (("memory.oom_control", "oom_kill "), ("memory.events", "oom_kill ")):
            with contextlib.suppress(OSError, ValueError):
                if self.folder is not None:
                    for line in (self.folder / name).read_text().splitlines():
                        if line.startswith(key):
                            return int(line.split()[1])
        return 0


@contextlib.contextmanager
def memory_cgroup(limit: Optional[int], root: Path = _CGROUPS) -> Iterator[Cap]:
    """A memory cgroup of `limit` bytes, swap included, for child processes; None: no cap is wanted."""
    if limit is None:
        yield Cap(None, "no cap")
        return
    v1 = root / "memory"
    version, base = (1, v1) if (v1 / "memory.limit_in_bytes").exists() or v1.is_dir() else (2, root)
    for old in base.glob(
        "hobbit-bench-*-*"
    ):  # of one that was killed; what still runs keeps its own, since nobody may remove that
        if not Path("/proc", old.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                old.rmdir()
    folder = base / f"hobbit-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if version == 2 and "memory" not in (base / "cgroup.subtree_control").read_text().split():
            (base / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as e:
        yield Cap(None, f"not capped: no memory cgroup may be made here ({e.strerror or e})")
        return
    try:
        try:
            if version == 1:
                (folder / "memory.limit_in_bytes").write_text(str(limit))
            else:
                (folder / "memory.max").write_text(str(limit))
        except OSError as e:
            yield Cap(None, f"not capped: the limit of a memory cgroup may not be set here ({e.strerror or e})")
            return
        with contextlib.suppress(OSError):  # kernels without accounting of swap have no such file
            if version == 1:
                (folder / "memory.memsw.limit_in_bytes").write_text(str(limit))
            else:
                (folder / "memory.swap.max").write_text("0")
        yield Cap(folder, f"cgroup v{version}")
    finally:
        # a process that was killed takes a moment to be gone
        for _ in range(50):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def under_cgroup(command: List[str], cap: Cap) -> List[str]:
    """The command, entering the cgroup before it becomes itself."""
    if cap.folder is None:
        return command
    return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cap.folder / "cgroup.procs"), *command]


# ---- the page cache and the disk ----


def drop_caches(paths: Iterable[Path]) -> str:
    """Leaves nothing of these files in the page cache, as far as it may. Returns how."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return "page cache dropped"
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return "the files' page cache given up"


def _read_ahead_setting(path: Path) -> Optional[Path]:
    """The file that holds the read-ahead of the device under `path`; a partition has that of its disk."""
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    candidates = [Path("/sys/class/bdi") / name / "read_ahead_kb"]
    with contextlib.suppress(OSError):
        block = (Path("/sys/dev/block") / name).resolve(strict=True)
        candidates += [block / "queue" / "read_ahead_kb", block.parent / "queue" / "read_ahead_kb"]
    return next((c for c in candidates if c.is_file()), None)


def get_read_ahead(path: Path) -> Optional[int]:
    """Read-ahead of the device under `path`, in KiB; None: unknown."""
    setting = _read_ahead_setting(path)
    with contextlib.suppress(OSError, ValueError):
        if setting is not None:
            return int(setting.read_text())
    return None


@contextlib.contextmanager
def read_ahead(path: Path, kib: Optional[int]) -> Iterator[Optional[str]]:
    """Sets the read-ahead of the device under `path` for a while. Yields None, or why it could not be set."""
    if kib is None:
        yield None
        return
    setting = _read_ahead_setting(path)
    if setting is None:
        yield "the read-ahead of this disk is not known"
        return
    try:
        before = setting.read_text()
        setting.write_text(str(kib))
    except OSError as e:
        yield f"the read-ahead may not be set here ({e.strerror or e})"
        return
    try:
        yield None
    finally:
        setting.write_text(before)


def kernel() -> str:
    """Name and release."""
    return f"{platform.system()} {platform.release()}"
