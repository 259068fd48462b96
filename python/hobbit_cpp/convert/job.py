"""convert(): from a checked start to a verified, renamed file, or nothing."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import ConvertError
from .ggtypes import load_types
from .header import ALIGNMENT_KEY, TensorInfo, Value, pad, string_value, u32_value, write_header
from .plan import ALIGNMENT, Plan, make_plan
from .progress import human_bytes, make_progress
from .quantise import Quantiser
from .source import Source
from .verify import verify
from .writer import flush, write_data, write_fully

__all__ = ["FORMAT_VERSION", "ConvertReport", "convert"]

FORMAT_VERSION = 1
# GGML_QNT_VERSION: readers expect it beside quantised tensors.
_QUANTISATION_VERSION = 2


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion made."""

    path: Path
    high_type: str
    low_type: str
    """The types, "mixed" where layers differ, "none" without low-precision copies."""
    bytes_dense: int
    bytes_high: int
    bytes_low: int
    bytes_source: int
    """Read from the source."""
    bytes_file: int
    n_layers: int
    """With routed experts."""
    n_experts: int
    """Of a layer."""
    fallbacks: tuple[str, ...]
    """What the user should know, a line each."""
    seconds: float


def convert(
    src: Path,
    dst: Path,
    *,
    high: str = "keep",
    low: str | None = "Q4_0",
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> ConvertReport:
    """Makes a GGUF with high- and low-precision routed experts of a Mixture-of-Experts GGUF.

    Args:
        src: The model; of a split one any part.
        dst: The new file. It appears whole or not at all.
        high: Type of the experts, "keep" for that of the source.
        low: Type of the low-precision copies, None for no copies.
        threads: How many; all cores by default.
        force: Replace `dst` if it exists.
        progress: True: on stderr; False: none; None: on a terminal.

    Raises:
        ConvertError: One line that says what to do.
    """
    start = time.monotonic()
    src = Path(src)
    if threads is not None and threads < 1:
        raise ConvertError("threads must be at least 1")
    # a symbolic link is followed: the file it names is replaced, not the link
    target = Path(os.path.realpath(dst))
    types = load_types()
    with Source(src, types) as source:
        _check_target(source, target, dst, force)
        plan = make_plan(source.tensors, types, high, low)
        values = _metadata(source, plan)
        head = write_header(values, [TensorInfo(o.name, o.source.shape, o.type.id, o.offset) for o in plan.outputs])
        data_offset = pad(len(head), ALIGNMENT)
        size = data_offset + plan.data_bytes
        _check_space(target, size)

        read_once = {o.source.name: o.source.n_bytes for o in plan.outputs}
        bytes_source = sum(read_once.values())
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        bar = None
        fd = -1
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            bar = make_progress(progress, bytes_source)
            os.ftruncate(fd, size)
            write_fully(fd, memoryview(head), 0)
            quantiser = Quantiser()
            write_data(source, plan, quantiser, fd, data_offset, threads or _n_cpus(), bar)
            flush(fd)
            verify(partial, source, plan, values, types, quantiser)
            if not force and os.path.lexists(target):
                raise ConvertError(f"{dst} was made by someone else meanwhile")
            os.replace(partial, target)
            _sync_folder(target.parent)
        except OSError as e:
            raise _write_error(e, target, size) from e
        finally:
            if bar is not None:
                bar.close()
            if fd >= 0:
                os.close(fd)
                partial.unlink(missing_ok=True)

    return ConvertReport(
        path=Path(dst),
        high_type=plan.high_type,
        low_type=plan.low_type,
        bytes_dense=plan.role_bytes("dense"),
        bytes_high=plan.role_bytes("high"),
        bytes_low=plan.role_bytes("low"),
        bytes_source=bytes_source,
        bytes_file=size,
        n_layers=plan.n_layers,
        n_experts=plan.n_experts,
        fallbacks=plan.notes,
        seconds=time.monotonic() - start,
    )


def _metadata(source: Source, plan: Plan) -> dict[str, Value]:
    """The metadata of the source, byte for byte, with ours in place of an earlier conversion's."""
    values = {k: v for k, v in source.values.items() if not k.startswith(("split.", "hobbit."))}
    values[ALIGNMENT_KEY] = u32_value(ALIGNMENT)
    values.setdefault("general.quantization_version", u32_value(_QUANTISATION_VERSION))
    values["hobbit.version"] = u32_value(FORMAT_VERSION)
    values["hobbit.high_type"] = string_value(plan.high_type)
    values["hobbit.low_type"] = string_value(plan.low_type)
    values["hobbit.source"] = string_value(source.path.name.encode("utf-8", "replace").decode())
    values["hobbit.converter"] = string_value(_package_version())
    return values


def _package_version() -> str:
    import hobbit_cpp

    return f"hobbit-cpp {hobbit_cpp.__version__}"


def _check_target(source: Source, target: Path, dst: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise ConvertError(f"{target.parent} is not a folder: make it first")
    if target.is_dir():
        raise ConvertError(f"{dst} is a folder: name the file to write in it")
    if not target.exists():
        return
    if any(os.path.samefile(target, path) for path in source.paths):
        raise ConvertError(f"{dst} is the input itself: choose another name for the output")
    if not target.is_file():
        raise ConvertError(f"{dst} is not a regular file")
    if not force:
        raise ConvertError(f"{dst} exists: use --force to replace it")


def _check_space(target: Path, size: int) -> None:
    stat = os.statvfs(target.parent)
    free = stat.f_bavail * stat.f_frsize
    if free < size:
        raise ConvertError(
            f"not enough space in {target.parent}: {human_bytes(size)} needed, {human_bytes(free)} free "
            f"({size} and {free} bytes)"
        )


def _write_error(e: OSError, target: Path, size: int) -> ConvertError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConvertError(
            f"the disk became full ({e.strerror}) while {target} was written: make {human_bytes(size)} free in "
            f"{target.parent}; nothing was left there"
        )
    if e.errno == errno.EFBIG:
        return ConvertError(f"{target} may not become {human_bytes(size)} large: raise the limit (ulimit -f)")
    return ConvertError(f"cannot write {target}: {e.strerror}")


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
