"""The model to convert: one GGUF or the parts of a split one, read by position."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hobbit_cpp._split import is_part, part_paths

from .errors import ConvertError
from .ggtypes import TypeTable
from .header import Header, Value, read_header
from .layout import SPLIT_MODEL_KEY
from .plan import Tensor

__all__ = ["Source", "Sources"]


class _Part:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ConvertError(f"cannot read {path}: it is not a file; name the .gguf file")
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise ConvertError(f"cannot read {path}: {e.strerror}") from e
        if hasattr(os, "posix_fadvise"):
            # What is read is given up by its range. Pages that were read ahead of it, in larger units, would stay.
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            self.stat = os.fstat(self.fd)
            self.size = self.stat.st_size
            with open(self.fd, "rb", closefd=False) as file:
                self.header = read_header(file, str(path), self.size)
        except OSError as e:
            os.close(self.fd)
            raise ConvertError(f"cannot read {path}: {e.strerror}") from e
        except BaseException:
            os.close(self.fd)
            raise


class Source:
    """The tensors and metadata of a model, all parts taken together. Reads are safe from several threads."""

    def __init__(
        self,
        path: Path,
        types: TypeTable,
        *,
        parts: Sequence[Path] | None = None,
        first_part: int = 0,
        header_only: bool = False,
    ) -> None:
        """Opens a model.

        Args:
            path: The model; of a split one any part.
            types: What ggml knows.
            parts: All its files, whatever their names; by default they are found by theirs.
            first_part: What `Tensor.part` counts from, so that several sources can be told apart.
            header_only: Nothing will be read, so the data need not be there.
        """
        self.path = path
        self.first_part = first_part
        self._header_only = header_only
        self._parts: list[_Part] = []
        try:
            if parts is not None:
                self._parts += [_Part(p) for p in parts]
            else:
                self._open(path)
            self.tensors = [t for i in range(len(self._parts)) for t in self._part_tensors(i, types)]
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        self._parts.append(_Part(path))
        count = self._parts[0].header.integer("split.count", 1)
        if count <= 1:
            return
        if not is_part(path, count):
            raise ConvertError(
                f"{path}: one of {count} parts of a split model, but not named like one "
                f"(...-00001-of-{count:05d}.gguf): restore the names of all parts"
            )
        for number, part_path in enumerate(part_paths(path, count)):
            if not part_path.exists():
                raise ConvertError(f"{part_path} is missing: all {count} parts must be in one folder")
            part = _Part(part_path)
            self._parts.append(part)
            is_number, is_count = part.header.integer("split.no", -1), part.header.integer("split.count", -1)
            if (is_number, is_count) != (number, count):
                raise ConvertError(
                    f"{part_path} says that it is part {is_number + 1} of {is_count}, not {number + 1} of {count}: "
                    "restore the names of all parts"
                )
        os.close(self._parts.pop(0).fd)
        first = self._parts[0].header
        for part in self._parts:
            for key in ("general.architecture", SPLIT_MODEL_KEY):
                own = part.header.string(key)
                if own and own != first.string(key):
                    raise ConvertError(f"{part.path} is part of another model than {self._parts[0].path}: download it again")

    def _part_tensors(self, index: int, types: TypeTable) -> list[Tensor]:
        part = self._parts[index]
        tensors = []
        end = 0
        for info in part.header.tensors:
            kind = types.get(info.type)
            if kind is None:
                raise ConvertError(
                    f"{part.path}: {info.name} has type {info.type}, which the llama.cpp of this package does not know"
                )
            offset = part.header.data_offset + info.offset
            tensor = Tensor(info.name, info.shape, kind, self.first_part + index, offset)
            if tensor.row % kind.block:
                raise ConvertError(f"{part.path}: corrupt: {info.name} has rows of {tensor.row} in type {kind.name}")
            tensors.append(tensor)
            end = max(end, tensor.offset + tensor.n_bytes)
        if end > part.size and not self._header_only:
            raise ConvertError(f"{part.path}: truncated: {end} bytes expected, {part.size} found: download the file again")
        return tensors

    def _check_tensors(self) -> None:
        names = {t.name for t in self.tensors}
        expected = self.header.integer("split.tensors.count", len(self.tensors))
        if len(names) != len(self.tensors) or expected != len(self.tensors):
            raise ConvertError(
                f"{self.path}: the parts do not belong together ({expected} tensors expected, "
                f"{len(self.tensors)} found): download all parts again"
            )

    @property
    def header(self) -> Header:
        """The header of the first part, which has the metadata of the model."""
        return self._parts[0].header

    @property
    def headers(self) -> list[Header]:
        """The headers of all parts."""
        return [part.header for part in self._parts]

    @property
    def values(self) -> Mapping[str, Value]:
        """The metadata."""
        return self.header.values

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [part.path for part in self._parts]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self._parts)

    def read(self, part: int, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from this place of a part. What was read does not stay in the page cache."""
        fd = self._parts[part - self.first_part].fd
        path = self._parts[part - self.first_part].path
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise ConvertError(f"cannot read {path} at byte {offset + done}: {e.strerror}") from e
            if n == 0:
                raise ConvertError(f"{path} became shorter while it was read")
            done += n
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """ConvertError when a file was written to, replaced or removed since it was opened."""
        for part in self._parts:
            try:
                now = [os.fstat(part.fd), os.stat(part.path)]
            except OSError as e:
                raise ConvertError(f"{part.path} went away while it was read: {e.strerror}") from e
            for stat in now:
                if _identity(stat) != _identity(part.stat):
                    raise ConvertError(f"{part.path} changed while it was read: run this again when it is complete")

    def close(self) -> None:
        """Closes all files."""
        for part in self._parts:
            os.close(part.fd)
        self._parts = []

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Sources:
    """Reads from several sources, whose parts are numbered on."""

    def __init__(self, *sources: Source) -> None:
        self._of = {source.first_part + i: source for source in sources for i in range(len(source.paths))}

    def read(self, part: int, offset: int, buffer: memoryview) -> None:
        """See `Source.read`."""
        self._of[part].read(part, offset, buffer)
