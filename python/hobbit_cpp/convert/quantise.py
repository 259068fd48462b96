"""Quantising and dequantising through the C API. cffi gives up the GIL, so threads truly run side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConvertError
from .ggtypes import TypeInfo
from .imatrix import Imatrix
from .plan import Tensor

__all__ = ["Quantiser"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Quantiser:
    """The quantisation calls of the C API. Safe from several threads."""

    def __init__(self, imatrix: Imatrix | None = None) -> None:
        from hobbit_cpp._lib import core

        self._ffi, self._lib = core()
        self._imatrix = imatrix

    def prepare(self, kind: TypeInfo) -> None:
        """Builds the tables of a type, once, before threads use it."""
        self._lib.hobbit_quantize_init(kind.id)

    def to_float(self, kind: TypeInfo, data: Bytes, out: Floats, what: str) -> None:
        """`data`, stored as `kind`, into `out`. `what` is for messages."""
        error = self._ffi.new("hobbit_error *")
        status = self._lib.hobbit_dequantize(
            kind.id, self._pointer("char[]", data), self._pointer("float[]", out), out.size, error
        )
        self._check(status, error, what)

    def quantise_rows(self, kind: TypeInfo, values: Floats, out: Bytes, tensor: Tensor, first_row: int) -> None:
        """`values`, whole rows of `tensor` from `first_row` on, into `out`, by the importance matrix if it has data."""
        row, n_rows = tensor.row, values.size // tensor.row
        importance = None if self._imatrix is None else self._imatrix.of(tensor.name)
        if importance is None:
            self.quantise(kind, values, out, row, f"{tensor.name}, rows from {first_row}")
            return
        # each expert has weights of its own
        per_expert = tensor.shape[1]
        done = 0
        while done < n_rows:
            expert = (first_row + done) // per_expert
            n = min(n_rows - done, (expert + 1) * per_expert - first_row - done)
            self.quantise(
                kind,
                values[done * row : (done + n) * row],
                out[kind.row_bytes(row) * done : kind.row_bytes(row) * (done + n)],
                row,
                f"{tensor.name}, rows from {first_row + done}",
                importance.weights(expert),
            )
            done += n

    def quantise(self, kind: TypeInfo, values: Floats, out: Bytes, row: int, what: str, weights: Floats | None = None) -> None:
        """`values`, whole rows of `row` floats, into `out`, stored as `kind`; `weights`: the importance of each column."""
        error = self._ffi.new("hobbit_error *")
        status = self._lib.hobbit_quantize(
            kind.id,
            self._pointer("float[]", values),
            self._pointer("char[]", out),
            values.size // row,
            row,
            self._ffi.NULL if weights is None else self._pointer("float[]", weights),
            error,
        )
        self._check(status, error, what)

    def _pointer(self, ctype: str, array: npt.NDArray[Any]) -> Any:
        return self._ffi.from_buffer(ctype, array)

    def _check(self, status: int, error: Any, what: str) -> None:
        if status != 0:
            raise ConvertError(f"{what}: {self._ffi.string(error.message).decode('utf-8', 'replace')}")
