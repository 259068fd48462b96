"""Writes an importance matrix, as IMatrixCollector::save_imatrix of llama.cpp does, and into the same file a sample of inputs."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .convert.header import TensorInfo, Value, pad, strings_value, write_header
from .convert.imatrix import F16, F32, I32, INPUTS_KEY, SELECTED_KEY
from .convert.layout import FileLayout
from .convert.target import target_paths, writing
from .convert.writer import write_fully

__all__ = ["ImatrixFile", "LayerSample", "Sums", "new_imatrix"]

# Of an expert tensor: sums of squares, float32 [experts, columns], and the numbers of inputs, [experts]
Sums = Tuple[npt.NDArray[Any], npt.NDArray[Any]]

_ALIGNMENT = 32
_DTYPES: Dict[int, np.dtype[Any]] = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), I32: np.dtype("<i4")}


@dataclass(frozen=True)
class LayerSample:
    """The inputs of one MoE layer: the expert tensors that they are inputs of, their columns, and how many experts see each."""

    layer: int
    tensors: Tuple[str, ...]
    n_columns: int
    k: int


@dataclass(frozen=True)
class _Layout(FileLayout):
    n_bytes: int = 0

    @property
    def size(self) -> int:
        return self.n_bytes


@contextlib.contextmanager
def new_imatrix(
    path: Path, values: Mapping[str, Value], tensors: Mapping[str, Sums], samples: Sequence[LayerSample], n_inputs: int
) -> Iterator[ImatrixFile]:
    """A new file, of which shapes are known and values come later. It appears at the end of the block, whole or not at all.

    Raises:
        ConvertError: it cannot be written, or there is no room for it.
    """
    infos: Dict[str, TensorInfo] = {}
    end = 0

    def place(name: str, shape: Sequence[int], kind: int) -> None:
        nonlocal end
        infos[name] = TensorInfo(name, tuple(reversed(shape)), kind, end)
        end += pad(math.prod(shape) * _DTYPES[kind].itemsize, _ALIGNMENT)

    all_values = dict(values)
    for name, (sums, _) in sorted(tensors.items()):
        place(f"{name}.in_sum2", sums.shape, F32)
        place(f"{name}.counts", (sums.shape[0], 1), F32)
    for sample in samples:
        all_values[f"{INPUTS_KEY}{sample.layer}"] = strings_value(sample.tensors)
        place(f"{INPUTS_KEY}{sample.layer}", (n_inputs, sample.n_columns), F16)
        place(f"{SELECTED_KEY}{sample.layer}", (n_inputs, sample.k), I32)
    head = write_header(all_values, list(infos.values()))
    data = pad(len(head), _ALIGNMENT)
    layout = _Layout(all_values, (), head, data + end)
    with writing(target_paths(path, [layout]), [layout], force=True) as (made,):
        yield ImatrixFile(made.fd, infos, data)


class ImatrixFile:
    """A file that is being written: see `new_imatrix`."""

    def __init__(self, fd: int, infos: Mapping[str, TensorInfo], data: int) -> None:
        self._fd, self._infos, self._data = fd, infos, data

    def add(self, layer: int, first: int, inputs: npt.NDArray[Any], selected: npt.NDArray[Any]) -> None:
        """Inputs of a layer, [tokens, columns], and the experts chosen for them, [tokens, k]; `first`: in the sample."""
        self._write(f"{INPUTS_KEY}{layer}", inputs, first)
        self._write(f"{SELECTED_KEY}{layer}", selected, first)

    def finish(self, tensors: Mapping[str, Sums]) -> None:
        """The sums, and all of it onto the disk."""
        for name, (sums, counts) in tensors.items():
            self._write(f"{name}.in_sum2", sums)
            self._write(f"{name}.counts", counts.reshape(-1, 1))
        os.fsync(self._fd)

    def _write(self, name: str, rows: npt.NDArray[Any], first: int = 0) -> None:
        info = self._infos[name]
        data = np.ascontiguousarray(rows, _DTYPES[info.type])
        write_fully(self._fd, data.data.cast("B"), self._data + info.offset + first * info.shape[0] * data.itemsize)
