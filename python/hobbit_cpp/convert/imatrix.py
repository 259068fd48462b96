"""Importance matrices as llama.cpp's llama-imatrix writes them: GGUF, or the binary .dat of old.

For each column of a weight matrix, the mean square of the activations it was multiplied by. Expert tensors have a row of
them for each expert. In a GGUF: `<tensor>.in_sum2`, sums of squares, [columns, experts], and `<tensor>.counts`, tokens,
[1, experts]. In a .dat: name, number of calls, means times that number; an expert without data has ones.
Weights are read as they are needed: the matrices of a large model take hundreds of megabytes.

A GGUF of `hobbit imatrix` also has, for each layer with experts, a sample of the inputs that all experts of a token share:
`hobbit.inputs.<i>`, F16 [columns, tokens], and `hobbit.selected.<i>`, I32 [k, tokens], the experts that the router chose; the
value `hobbit.inputs.<i>`: the names of the expert tensors that they are inputs of. llama.cpp passes over what it does not know.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hobbit_cpp._split import base_name

from .errors import ConvertError
from .header import Header, TensorInfo, read_header
from .moments import LayerInputs
from .plan import Tensor

__all__ = ["F16", "F32", "I32", "INPUTS_KEY", "SELECTED_KEY", "Imatrix", "Importance", "imatrix_path"]

Floats = npt.NDArray[np.float32]

F32, F16, I32 = 0, 1, 26  # of ggml_type
_ITEM_BYTES = {F32: 4, F16: 2, I32: 4}
INPUTS_KEY, SELECTED_KEY = "hobbit.inputs.", "hobbit.selected."
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


@dataclass(frozen=True)
class _Sample:
    """The inputs of a layer in the file."""

    owner: Imatrix
    name: str
    n_tokens: int
    n_columns: int
    k: int
    place: int
    place_selected: int

    def inputs(self) -> npt.NDArray[np.float16]:
        """[tokens, columns]."""
        data = self.owner.read_bytes(self.place, 2 * self.n_tokens * self.n_columns)
        values = np.frombuffer(data, "<f2").reshape(self.n_tokens, self.n_columns)
        if not np.isfinite(values).all():
            raise ConvertError(f"{self.owner.path}: {self.name}: a value that is not finite: it is damaged, make it again")
        return values.astype(np.float16, copy=False)

    def selected(self) -> npt.NDArray[np.int32]:
        """[tokens, k]."""
        data = self.owner.read_bytes(self.place_selected, 4 * self.n_tokens * self.k)
        return np.frombuffer(data, "<i4").reshape(self.n_tokens, self.k).astype(np.int32, copy=False)


class Imatrix:
    """An importance matrix file. Safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._importance: dict[str, Importance] = {}
        self._samples: dict[str, _Sample] = {}
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
            sample = self._samples.get(tensor.name)
            if sample is not None and sample.n_columns != tensor.row:
                raise ConvertError(
                    f"{self.path}: {sample.name} has {sample.n_columns} columns, {tensor.name} {tensor.row}: "
                    "this importance matrix is of another model"
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

    @property
    def samples(self) -> dict[str, LayerInputs]:
        """By expert tensor that was checked, where there are inputs; one object for all tensors that share them."""
        return {name: sample for name, sample in self._samples.items() if name in self._importance}

    def read(self, offset: int, n: int) -> Floats:
        """`n` floats from this place of the file."""
        return np.frombuffer(self.read_bytes(offset, 4 * n), "<f4").astype(np.float32, copy=False)

    def read_bytes(self, offset: int, n: int) -> bytearray:
        """`n` bytes from this place of the file."""
        data = bytearray(n)
        done = 0
        while done < n:
            more = os.preadv(self._fd, [memoryview(data)[done:]], offset + done)
            if more == 0:
                raise ConvertError(f"{self.path} became shorter while it was read")
            done += more
        return data

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
            if counts is None or sums.type != F32 or counts.type != F32:
                raise ConvertError(f"{self.path}: no counts of {tensor}: not an importance matrix of llama.cpp")
            places = [self._place(header, info, size) for info in (sums, counts)]
            numbers = self.read(*places[1])
            if not np.isfinite(numbers).all():
                raise ConvertError(f"{self.path}: the counts of {tensor} are not numbers: make it again")
            self._entries[tensor] = _Entry(*places[0], np.round(numbers))
        if not self._entries:
            raise ConvertError(f"{self.path} is a GGUF, but not an importance matrix of llama.cpp")
        for key in header.values:
            if key.startswith(INPUTS_KEY):
                self._scan_sample(header, infos, key, size)

    def _scan_sample(self, header: Header, infos: dict[str, TensorInfo], key: str, size: int) -> None:
        inputs, selected = infos.get(key), infos.get(SELECTED_KEY + key[len(INPUTS_KEY) :])
        if (
            inputs is None
            or selected is None
            or (inputs.type, selected.type) != (F16, I32)
            or not len(inputs.shape) == len(selected.shape) == 2
            or inputs.shape[1] != selected.shape[1]
        ):
            raise ConvertError(f"{self.path}: {key} is not a sample of inputs: make it again")
        (place, _), (place_selected, _) = (self._place(header, info, size) for info in (inputs, selected))
        sample = _Sample(self, key, inputs.shape[1], inputs.shape[0], selected.shape[0], place, place_selected)
        self._samples.update((name, sample) for name in header.strings(key))

    def _place(self, header: Header, info: TensorInfo, size: int) -> tuple[int, int]:
        """Where a tensor is, and its elements."""
        n = math.prod(info.shape)
        offset = header.data_offset + info.offset
        end = offset + _ITEM_BYTES[info.type] * n
        if end > size:
            raise ConvertError(f"{self.path}: truncated: {end} bytes expected, {size} found: make it again")
        return offset, n

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
