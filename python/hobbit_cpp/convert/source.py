"""The model to convert: one GGUF or the parts of a split one, read by position."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from .errors import ConvertError
from .ggtypes import TypeTable
from .header import Header, Value, read_header
from .plan import Tensor

__all__ = ["Source"]

_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)


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
        try:
            self.size = os.fstat(self.fd).st_size
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

    def __init__(self, path: Path, types: TypeTable) -> None:
        self.path = path
        self._parts: list[_Part] = []
        try:
            self._parts.append(_Part(path))
            count = self._parts[0].header.integer("split.count", 1)
            if count > 1:
                self._open_parts(path, count)
            self.tensors = [t for i in range(len(self._parts)) for t in self._part_tensors(i, types)]
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    def _open_parts(self, path: Path, count: int) -> None:
        name = _SPLIT_NAME.match(path.name)
        if name is None or int(name["count"]) != count:
            raise ConvertError(
                f"{path}: one of {count} parts of a split model, but not named like one "
                f"(...-00001-of-{count:05d}.gguf): restore the names of all parts"
            )
        for number in range(1, count + 1):
            part_path = path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf")
            if not part_path.exists():
                raise ConvertError(f"{part_path} is missing: all {count} parts must be in one folder")
            self._parts.append(_Part(part_path))
        os.close(self._parts.pop(0).fd)

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
            tensor = Tensor(info.name, info.shape, kind, index, part.header.data_offset + info.offset)
            if tensor.row % kind.block:
                raise ConvertError(f"{part.path}: corrupt: {info.name} has rows of {tensor.row} in type {kind.name}")
            tensors.append(tensor)
            end = max(end, tensor.offset + tensor.n_bytes)
        if end > part.size:
            raise ConvertError(
                f"{part.path}: truncated: {end} bytes expected, {part.size} found: download the file again"
            )
        return tensors

    def _check_tensors(self) -> None:
        expected = self.header.integer("split.tensors.count", len(self.tensors))
        names = {t.name for t in self.tensors}
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
    def values(self) -> Mapping[str, Value]:
        """The metadata."""
        return self.header.values

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [part.path for part in self._parts]

    def read(self, part: int, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from this place of a part. What was read does not stay in the page cache."""
        fd = self._parts[part].fd
        path = self._parts[part].path
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

    def close(self) -> None:
        """Closes all files."""
        for part in self._parts:
            os.close(part.fd)
        self._parts = []

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
