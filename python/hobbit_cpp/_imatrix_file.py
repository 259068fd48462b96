"""Writes an importance matrix, as IMatrixCollector::save_imatrix of llama.cpp does, and into the same file a sample of inputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .convert.header import TensorInfo, Value, pad, strings_value, write_header
from .convert.imatrix import F16, F32, I32, INPUTS_KEY, SELECTED_KEY
from .convert.writer import write_fully

__all__ = ["ImatrixFile", "LayerSample", "Sums"]

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


class ImatrixFile:
    """A new file, of which shapes are known and values come later. It is written beside `path` and renamed when it is whole."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Value],
        tensors: Mapping[str, Sums],
        samples: Sequence[LayerSample],
        n_inputs: int,
    ) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._infos: Dict[str, TensorInfo] = {}
        self._end = 0
        all_values = dict(values)
        for name, (sums, _) in sorted(tensors.items()):
            self._place(f"{name}.in_sum2", sums.shape, F32)
            self._place(f"{name}.counts", (sums.shape[0], 1), F32)
        for sample in samples:
            all_values[f"{INPUTS_KEY}{sample.layer}"] = strings_value(sample.tensors)
            self._place(f"{INPUTS_KEY}{sample.layer}", (n_inputs, sample.n_columns), F16)
            self._place(f"{SELECTED_KEY}{sample.layer}", (n_inputs, sample.k), I32)
        header = write_header(all_values, list(self._infos.values()))
        self._data = pad(len(header), _ALIGNMENT)
        self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(self._fd, self._data + self._end)
            write_fully(self._fd, memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def add(self, layer: int, first: int, inputs: npt.NDArray[Any], selected: npt.NDArray[Any]) -> None:
        """Inputs of a layer, [tokens, columns], and the experts chosen for them, [tokens, k]; `first`: in the sample."""
        self._write(f"{INPUTS_KEY}{layer}", inputs, first)
        self._write(f"{SELECTED_KEY}{layer}", selected, first)

    def finish(self, tensors: Mapping[str, Sums]) -> None:
        """The sums; then the file appears."""
        for name, (sums, counts) in tensors.items():
            self._write(f"{name}.in_sum2", sums)
            self._write(f"{name}.counts", counts.reshape(-1, 1))
        os.fsync(self._fd)
        os.replace(self._partial, self._path)

    def close(self) -> None:
        """Removes what did not become whole."""
        os.close(self._fd)
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ImatrixFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _place(self, name: str, shape: Sequence[int], kind: int) -> None:
        self._infos[name] = TensorInfo(name, tuple(reversed(shape)), kind, self._end)
        self._end += pad(int(np.prod(shape, dtype=np.int64)) * _DTYPES[kind].itemsize, _ALIGNMENT)

    def _write(self, name: str, rows: npt.NDArray[Any], first: int = 0) -> None:
        info = self._infos[name]
        data = np.ascontiguousarray(rows, _DTYPES[info.type])
        write_fully(self._fd, data.data.cast("B"), self._data + info.offset + first * info.shape[0] * data.itemsize)
