"""Importance matrices as llama.cpp's llama-imatrix writes them: GGUF, or the binary .dat of old.

For each column of a weight matrix, the mean square of the activations it was multiplied by. Expert tensors have a row of
them for each expert. In a GGUF: `<tensor>.in_sum2`, sums of squares, [columns, experts], and `<tensor>.counts`, tokens,
[1, experts]. In a .dat: name, number of calls, means times that number; an expert without data has ones.
Weights are read as they are needed: the matrices of a large model take hundreds of megabytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hobbit_cpp._split import base_name

from .errors import ConvertError
from .header import Header, read_header
from .plan import Tensor

__all__ = ["Imatrix", "Importance", "imatrix_path"]

Floats = npt.NDArray[np.float32]

_F32 = 0
_I32 = struct.Struct("<i")
_MAX_NAME_BYTES = 1024
# Of the mean. Zero weights (a column that was never used) leave ggml's quantisers for few bits without a choice, and they abort.
_LEAST = 1e-6


def imatrix_path(model: Path) -> Path:
    """The name that the importance matrix of a model has: `model.imatrix.gguf` beside `model.gguf`, or beside its parts."""
    return model.with_name(f"{base_name(model)}.imatrix.gguf")


@dataclass(frozen=True)
class _Entry:
    """Where the values of a tensor are."""

    offset: int
    n_values: int
    counts: Floats
    """Tokens of each expert; one number when it holds for all."""


class Importance:
    """The importance of the columns of one tensor."""

    def __init__(self, owner: Imatrix, name: str, entry: _Entry, n_expert: int) -> None:
        self._owner, self._name, self._entry = owner, name, entry
        self._row = entry.n_values // n_expert
        self._counts = np.broadcast_to(entry.counts, n_expert) if entry.counts.size == 1 else entry.counts
        self._mean: Floats | None = None

    @property
    def missing(self) -> int:
        """Experts without data."""
        return int((self._counts <= 0).sum())

    def weights(self, expert: int) -> Floats:
        """Of the columns of an expert: float32 [row]. Without data: the mean over the other experts."""
        if self._counts[expert] > 0:
            out = self._sums(expert) / self._counts[expert]
        else:
            if self._mean is None:
                self._mean = self._mean_of_all()
            out = self._mean
        mean = float(out.mean())
        return np.maximum(out, np.float32(mean * _LEAST)) if mean > 0 else np.ones_like(out)

    def _sums(self, expert: int) -> Floats:
        values = self._owner.read(self._entry.offset + 4 * self._row * expert, self._row)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ConvertError(
                f"{self._owner.path}: {self._name}, expert {expert}: a value that is not finite or below zero: "
                "the importance matrix is damaged, make it again"
            )
        return values

    def _mean_of_all(self) -> Floats:
        total = np.zeros(self._row, np.float64)
        for expert in np.flatnonzero(self._counts > 0):
            total += self._sums(int(expert))
        n = float(self._counts[self._counts > 0].sum())
        return (total / n if n > 0 else total).astype(np.float32)


class Imatrix:
    """An importance matrix file. Safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._importance: dict[str, Importance] = {}
        if path.exists() and not path.is_file():
            raise ConvertError(f"cannot read {path}: it is not a file; name the importance matrix")
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise ConvertError(f"cannot read {path}: {e.strerror}") from e
        try:
            size = os.fstat(self._fd).st_size
            if os.pread(self._fd, 4, 0) == b"GGUF":
                with open(self._fd, "rb", closefd=False) as file:
                    self._scan_gguf(read_header(file, str(path), size), size)
            else:
                self._scan_legacy(size)
        except OSError as e:
            self.close()
            raise ConvertError(f"cannot read {path}: {e.strerror}") from e
        except BaseException:
            self.close()
            raise

    def check(self, tensors: Iterable[Tensor]) -> list[str]:
        """Takes the entries of these tensors for use.

        Returns:
            What the user should know, a line each.

        Raises:
            ConvertError: An entry is of another shape, or there is none for any of the tensors.
        """
        missing, of_tensors, some = 0, 0, False
        for tensor in tensors:
            entry = self._entries.get(tensor.name)
            if entry is None:
                continue
            some = True
            n_expert = tensor.shape[2]
            if entry.n_values != tensor.row * n_expert or entry.counts.size not in (1, n_expert):
                raise ConvertError(
                    f"{self.path}: {tensor.name} has {entry.n_values} values for {entry.counts.size} experts, but the model "
                    f"needs {tensor.row} for each of {n_expert}: this importance matrix is of another model"
                )
            importance = Importance(self, tensor.name, entry, n_expert)
            if importance.missing == n_expert:
                continue
            self._importance[tensor.name] = importance
            missing += importance.missing
            of_tensors += importance.missing > 0
        if not some:
            raise ConvertError(f"{self.path} has no data for any expert of this model: was it made with another?")
        if missing:
            return [
                f"{missing} experts of {of_tensors} tensors have no data in the importance matrix: "
                "the mean of the other experts is used"
            ]
        return []

    @property
    def names(self) -> frozenset[str]:
        """The tensors with data, of those that were checked."""
        return frozenset(self._importance)

    def of(self, name: str) -> Importance | None:
        """The importance for a tensor that was checked; None without data."""
        return self._importance.get(name)

    def read(self, offset: int, n: int) -> Floats:
        """`n` floats from this place of the file."""
        data = os.pread(self._fd, 4 * n, offset)
        if len(data) != 4 * n:
            raise ConvertError(f"{self.path} became shorter while it was read")
        return np.frombuffer(data, "<f4").astype(np.float32, copy=False)

    def close(self) -> None:
        """Closes the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Imatrix:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _scan_gguf(self, header: Header, size: int) -> None:
        infos = {info.name: info for info in header.tensors}
        for name, sums in infos.items():
            if not name.endswith(".in_sum2"):
                continue
            tensor = name[: -len(".in_sum2")]
            counts = infos.get(tensor + ".counts")
            if counts is None or sums.type != _F32 or counts.type != _F32:
                raise ConvertError(f"{self.path}: no counts of {tensor}: not an importance matrix of llama.cpp")
            places = []
            for info in (sums, counts):
                n = int(np.prod(info.shape, dtype=np.int64)) if info.shape else 1
                offset = header.data_offset + info.offset
                if offset + 4 * n > size:
                    raise ConvertError(f"{self.path}: truncated: {offset + 4 * n} bytes expected, {size} found: make it again")
                places.append((offset, n))
            numbers = self.read(*places[1])
            if not np.isfinite(numbers).all():
                raise ConvertError(f"{self.path}: the counts of {tensor} are not numbers: make it again")
            self._entries[tensor] = _Entry(*places[0], np.round(numbers))
        if not self._entries:
            raise ConvertError(f"{self.path} is a GGUF, but not an importance matrix of llama.cpp")

    def _scan_legacy(self, size: int) -> None:
        at = 0

        def bad(what: str) -> ConvertError:
            return ConvertError(f"{self.path}: not an importance matrix of llama.cpp, or a damaged one ({what} at byte {at})")

        def number() -> int:
            nonlocal at
            data = os.pread(self._fd, 4, at)
            if len(data) < 4:
                raise bad("it ends")
            at += 4
            return int(_I32.unpack(data)[0])

        n_entries = number()
        if not 0 < n_entries <= size // 16:
            raise bad(f"{n_entries} entries")
        for _ in range(n_entries):
            length = number()
            if not 0 < length <= _MAX_NAME_BYTES:
                raise bad(f"a name of {length} bytes")
            name = os.pread(self._fd, length, at).decode("utf-8", "replace")
            at += length
            n_calls, n_values = number(), number()
            if n_values < 1 or at + 4 * n_values > size:
                raise bad(f"{n_values} values")
            # means times the number of calls; of no calls upstream takes the values as they are
            self._entries[name] = _Entry(at, n_values, np.array([max(n_calls, 1)], np.float32))
            at += 4 * n_values
