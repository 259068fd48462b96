"""What this machine can give: the disk at a model's expert size and queue depth, the cores at its types of weights.

Measured once and kept in the user's cache folder; nothing here is ever a reason to fail: what cannot be measured is
None, what cannot be kept is measured again, and what is measured on a busy machine is not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Union

from ._cgroups import read_limit
from ._files import replacing
from ._heat import cache_folder
from ._session import Session
from .errors import HobbitError
from .params import OffloadParams

__all__ = [
    "DEPTHS",
    "DiskProbe",
    "cache_file",
    "cpu_name",
    "is_busy",
    "probe_compute",
    "probe_disk",
    "recall_floor",
    "remember_floor",
]

DEPTHS = (1, 2, 4, 8, 16)
"""Reads under way at a time, for which a disk is probed."""

_DISK_SECONDS = 0.5
_COMPUTE_SECONDS = 0.3
# Figures of another format are not read.
_FORMAT = 2
# A disk that was half full and a CPU that was cool are another machine half a year later.
_KEEP_SECONDS = 180 * 86400

Pathlike = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class DiskProbe:
    """Random reads of whole expert slices of one file.

    Attributes:
        read_bytes: mean size of a read.
        bandwidth: bytes a second by queue depth.
        direct: past the page cache.
        measured: seconds since 1970.
    """

    read_bytes: int
    bandwidth: Dict[int, float]
    direct: bool
    measured: float

    @property
    def best(self) -> float:
        """The most that any depth gave, in bytes a second."""
        return max(self.bandwidth.values())

    @property
    def best_depth(self) -> int:
        """The smallest depth that gives 95 % of the most."""
        return min(depth for depth, rate in self.bandwidth.items() if rate >= 0.95 * self.best)

    def at(self, depth: float) -> float:
        """Bytes a second at a depth between those that were measured.

        A disk gives no less at a greater depth, and at a smaller one at least that share of it. What a busy machine measures
        otherwise is noise, by which more memory would be slower.
        """
        known = sorted(self.bandwidth)
        rates = {d: max(rate * min(1.0, d / at) for at, rate in self.bandwidth.items()) for d in known}
        if depth <= known[0]:
            return rates[known[0]] * depth / known[0]
        for low, high in zip(known, known[1:]):
            if depth <= high:
                part = (depth - low) / (high - low)
                return rates[low] * (1 - part) + rates[high] * part
        return rates[known[-1]]


def probe_disk(model: Pathlike, *, low: bool = False, fresh: bool = False, seconds: float = _DISK_SECONDS) -> Optional[DiskProbe]:
    """Reads expert slices at random places of the model's own files, as the engine does, at each depth of `DEPTHS`.

    Args:
        model: a GGUF with experts.
        low: its low-precision copies.
        fresh: measure, though it is known.
        seconds: for each depth.

    Returns:
        None when it cannot be measured.
    """
    try:
        session = Session(os.fspath(model), OffloadParams())
    except HobbitError:
        return None
    try:
        info = session.info
        expert = info.bytes_expert_low if low else info.bytes_expert_high
        # what is kept holds for this disk, under the same limit, and experts of about this size
        limit = read_limit(model)
        key = f"disk {_device(model)} {_rounded(expert)} {'direct' if info.direct_io else 'buffered'}"
        key += "" if limit is None else f" at most {limit}"
        kept = None if fresh else _recall(key)
        if kept is not None:
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                rates = {int(depth): float(rate) for depth, rate in kept.pop("bandwidth").items()}
                if rates:
                    return DiskProbe(bandwidth=rates, **kept)
        rates = {}
        reads = n_bytes = 0
        for depth in DEPTHS:
            n, moved, spent = session.probe_read(low, depth, seconds)
            rates[depth] = moved / spent
            reads, n_bytes = reads + n, n_bytes + moved
    except HobbitError:
        return None
    finally:
        session.close()
    probe = DiskProbe(n_bytes // max(reads, 1), rates, info.direct_io, time.time())
    _remember(key, asdict(probe))
    return probe


def probe_compute(
    type_id: int, n_in: int, n_out: int, threads: int, *, fresh: bool = False, seconds: float = _COMPUTE_SECONDS
) -> Optional[float]:
    """Bytes of weights a second in products of one token with [n_in, n_out] matrices of a ggml type.

    Returns:
        None when it cannot be measured.
    """
    from . import _lib

    _lib.load_bindings()  # which keep ggml's log off the terminal
    key = f"compute {_cores()} {type_id} {n_in}x{n_out} {threads}"
    kept = None if fresh else _recall(key)
    if kept is not None and isinstance(kept.get("rate"), (int, float)):
        return float(kept["rate"])
    ffi, lib = _lib.core()
    rate = ffi.new("double *")
    best = 0.0
    # Where other programs hold the cores, threads wait for one another and one alone is quicker: what it does they can
    # at least.
    for n in sorted({1, threads}):
        try:
            _lib.call(lib.hobbit_probe_compute, type_id, n_in, n_out, n, seconds, rate)
        except HobbitError:
            return None
        best = max(best, float(rate[0]))
    _remember(key, {"rate": best, "measured": time.time()})
    return best


def remember_floor(model: Pathlike, threads: int, seconds: float) -> None:
    """Keeps the time of a token with every expert of the model in memory: the least that was measured of late, since what else
    the machine did makes it longer."""
    seconds = min(seconds, recall_floor(model, threads) or seconds)
    _remember(_floor_key(model, threads), {"seconds": seconds, "measured": time.time()})


def recall_floor(model: Pathlike, threads: int) -> Optional[float]:
    """What `remember_floor` kept, in seconds a token."""
    kept = _recall(_floor_key(model, threads))
    return float(kept["seconds"]) if kept is not None and isinstance(kept.get("seconds"), (int, float)) else None


def _floor_key(model: Pathlike, threads: int) -> str:
    stat = os.stat(model)
    return f"floor {_cores()} {os.path.realpath(model)} {stat.st_size} {stat.st_mtime_ns} {threads}"


def _cores() -> str:
    """The CPU, and the build whose kernels run on it: what another build needed says nothing of this one."""
    from ._lib import LIB_DIR

    built = max((file.stat().st_mtime_ns for file in LIB_DIR.glob("*.so")), default=0)
    return f"{cpu_name()} {built}"


def cpu_name() -> str:
    """As the kernel calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(path: Pathlike) -> str:
    device = os.stat(path).st_dev
    return f"{platform.node()} {os.major(device)}:{os.minor(device)}"


def _rounded(n: int) -> int:
    """To one of eight steps between powers of two."""
    step = max(1, 1 << max(0, n.bit_length() - 4))
    return (n + step // 2) // step * step


# ---- what is kept ----


def cache_file() -> Path:
    """Where figures are kept: $HOBBIT_CACHE_DIR/probes.json, else in hobbit-cpp/ of the user's cache folder."""
    return cache_folder() / "probes.json"


def _load() -> Dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("format") == _FORMAT and isinstance(kept.get("figures"), dict):
            return dict(kept["figures"])
    return {}


def _recall(key: str) -> Optional[Dict[str, Any]]:
    value = _load().get(key)
    if not isinstance(value, dict):
        return None
    measured = value.get("measured")
    return dict(value) if isinstance(measured, (int, float)) and time.time() - measured <= _KEEP_SECONDS else None


def is_busy() -> bool:
    """Other programs want all of the cores: figures of now are not those of this machine."""
    with contextlib.suppress(OSError):
        return os.getloadavg()[0] > (os.cpu_count() or 1) + 1
    return False


def _remember(key: str, value: Dict[str, Any]) -> None:
    if is_busy():
        return
    with contextlib.suppress(OSError):
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps({"format": _FORMAT, "figures": {**_load(), key: value}}, indent=1), encoding="utf-8")
