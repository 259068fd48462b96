"""The new files: written beside where they will be, renamed when all of them are whole, else removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hobbit_cpp._memory import human
from hobbit_cpp._split import base_name, part_paths
from hobbit_cpp.errors import HobbitError

from .errors import ConvertError
from .layout import FileLayout
from .writer import write_fully

__all__ = ["NewFile", "check_targets", "target_paths", "writing"]


@dataclass(frozen=True)
class NewFile:
    """A file that is being written."""

    path: Path
    """Where it will be."""
    partial: Path
    """Where it is."""
    fd: int
    layout: FileLayout


def target_paths(dst: Path, layout: Sequence[FileLayout]) -> list[Path]:
    """Where the files of a layout will be. A symbolic link is followed: what it names is replaced, not the link."""
    if len(layout) > 1:
        return [Path(os.path.realpath(path)) for path in part_paths(dst, len(layout))]
    return [Path(os.path.realpath(dst))]


def check_targets(paths: Sequence[Path], inputs: Sequence[Path], force: bool) -> None:
    """ConvertError unless all of `paths` may be written."""
    for path in paths:
        if not path.parent.is_dir():
            raise ConvertError(f"{path.parent} is not a folder: make it first")
        if path.is_dir():
            raise ConvertError(f"{path} is a folder: name the file to write in it")
        if not path.exists():
            continue
        if any(os.path.samefile(path, given) for given in inputs):
            raise ConvertError(f"{path} is the input itself: choose another name for the output")
        if not path.is_file():
            raise ConvertError(f"{path} is not a regular file")
        if not force:
            raise ConvertError(f"{path} exists: use --force to replace it")


@contextlib.contextmanager
def writing(paths: Sequence[Path], layout: Sequence[FileLayout], force: bool) -> Iterator[list[NewFile]]:
    """Files to write the data of `layout` into. At the end of the block they appear under their names, after an exception
    nothing is left. Of a killed process partial files stay; the next conversion to the same name removes them."""
    size = sum(file.size for file in layout)
    for path in paths:
        _remove_stale(path)
    _check_space(paths[0].parent, size)
    files: list[NewFile] = []
    try:
        for path, file in zip(paths, layout):
            partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            files.append(NewFile(path, partial, fd, file))
            with contextlib.suppress(OSError):  # a file system without locks: nothing is ever removed there
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says to others that somebody still writes it
            os.ftruncate(fd, file.size)
            write_fully(fd, memoryview(file.head), 0)
        yield files
        if not force:
            for made in files:
                if os.path.lexists(made.path):
                    raise ConvertError(f"{made.path} was made by someone else meanwhile")
        _publish(files)
    except HobbitError:  # some are OSErrors as well
        raise
    except OSError as e:
        raise _write_error(e, paths[0], size) from e
    finally:
        for made in files:
            os.close(made.fd)
            made.partial.unlink(missing_ok=True)


def _publish(files: Sequence[NewFile]) -> None:
    # A split model is opened by its first part: that goes first and comes last, so that old and new parts never make one.
    if len(files) > 1:
        files[0].path.unlink(missing_ok=True)
    for made in reversed(files):
        os.replace(made.partial, made.path)
    fd = os.open(files[0].path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # the renames are durable
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    """Removes what killed conversions to this name left, however many parts they had."""
    stem = re.escape(base_name(path))
    pattern = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?(\.gguf)?\.partial-\d+", re.IGNORECASE)
    for other in list(path.parent.glob("*.partial-*")):
        if pattern.fullmatch(other.name) is None:
            continue
        with contextlib.suppress(OSError):
            fd = os.open(other, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody is at work on it
                other.unlink()
            finally:
                os.close(fd)


def _check_space(folder: Path, size: int) -> None:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < size:
        raise ConvertError(f"not enough space in {folder}: {human(size)} needed, {human(free)} free ({size} and {free} bytes)")


def _write_error(e: OSError, target: Path, size: int) -> ConvertError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConvertError(
            f"the disk became full ({e.strerror}) while {target} was written: make {human(size)} free in "
            f"{target.parent}; nothing was left there"
        )
    if e.errno == errno.EFBIG:
        return ConvertError(f"{target} may not become {human(size)} large: raise the limit (ulimit -f)")
    return ConvertError(f"cannot write {target}: {e.strerror}")
