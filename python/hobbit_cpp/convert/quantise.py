"""Quantising and dequantising through the C API. cffi gives up the GIL, so threads truly run side by side."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import numpy as np
import numpy.typing as npt

from hobbit_cpp._lib import call, core
from hobbit_cpp.errors import HobbitError

from .errors import ConvertError
from .ggtypes import TypeInfo
from .imatrix import Imatrix
from .moments import Moments
from .plan import Tensor

__all__ = ["NEGLIGIBLE", "Quantiser"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

NEGLIGIBLE = 1e-6
"""Root mean square of weights that may as well be zero: of an expert that was never trained, or was removed. Scales are F16."""

# With more bits a weight, hardly anything is rounded away that could be made good.
_FEEDBACK_BITS = 7


class Quantiser:
    """The quantisation calls of the C API. Safe from several threads."""

    def __init__(self, imatrix: Imatrix | None = None) -> None:
        self._ffi, self._lib = core()
        self._imatrix = imatrix
        self._moments = None if imatrix is None else Moments(imatrix.samples)

    def prepare(self, kind: TypeInfo) -> None:
        """Builds the tables of a type, once, before threads use it."""
        self._lib.hobbit_quantize_init(kind.id)

    def to_float(self, kind: TypeInfo, data: Bytes, out: Floats, what: str) -> None:
        """`data`, stored as `kind`, into `out`. `what` is for messages."""
        with _naming(what):
            call(self._lib.hobbit_dequantize, kind.id, self._pointer("char[]", data), self._pointer("float[]", out), out.size)

    def quantise_rows(self, kind: TypeInfo, values: Floats, out: Bytes, tensor: Tensor, first_row: int) -> None:
        """`values`, whole rows of `tensor` from `first_row` on, into `out`, by the importance matrix if it has data.

        With a sample of inputs in it by error feedback: so a row comes out the same whatever rows it is quantised with.
        """
        row, n_rows = tensor.row, values.size // tensor.row
        importance = None if self._imatrix is None else self._imatrix.of(tensor.name)
        if importance is None:
            self.quantise(kind, values, out, row, f"{tensor.name}, rows from {first_row}")
            return
        moments = self._moments if kind.bits < _FEEDBACK_BITS else None
        # each expert has weights of its own
        per_expert = tensor.shape[1]
        done = 0
        while done < n_rows:
            expert = (first_row + done) // per_expert
            n = min(n_rows - done, (expert + 1) * per_expert - first_row - done)
            of = values[done * row : (done + n) * row]
            to = out[kind.row_bytes(row) * done : kind.row_bytes(row) * (done + n)]
            what = f"{tensor.name}, rows from {first_row + done}"
            factor = None if moments is None else moments.factor(tensor.name, expert)
            if factor is None:
                self.quantise(kind, of, to, row, what, importance.weights(expert))
            else:
                self.quantise_feedback(kind, of, to, what, factor)
            done += n

    def group(self, tensor: Tensor) -> tuple[int, int] | None:
        """The same for tensors whose rows are best quantised together, expert by expert of as many; None: alone."""
        inputs = None if self._moments is None else self._moments.group(tensor.name)
        return None if inputs is None else (inputs, tensor.shape[2])

    def quantise_feedback(self, kind: TypeInfo, values: Floats, out: Bytes, what: str, factor: Floats) -> None:
        """`values`, whole rows, into `out`, stored as `kind`; `factor`: see `Moments.factor`."""
        self._quantise(self._lib.hobbit_quantize_feedback, kind, values, out, len(factor), what, factor)

    def quantise(self, kind: TypeInfo, values: Floats, out: Bytes, row: int, what: str, weights: Floats | None = None) -> None:
        """`values`, whole rows of `row` floats, into `out`, stored as `kind`; `weights`: the importance of each column."""
        self._quantise(self._lib.hobbit_quantize, kind, values, out, row, what, weights)

    def _quantise(
        self, function: Any, kind: TypeInfo, values: Floats, out: Bytes, row: int, what: str, by: Floats | None
    ) -> None:
        source, target = self._pointer("float[]", values), self._pointer("char[]", out)
        weights = self._ffi.NULL if by is None else self._pointer("float[]", by)
        with _naming(what):
            call(function, kind.id, source, target, values.size // row, row, weights)

    def _pointer(self, ctype: str, array: npt.NDArray[Any]) -> Any:
        return self._ffi.from_buffer(ctype, array)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """An error of the core says what it could not be done to."""
    try:
        yield
    except HobbitError as e:
        raise ConvertError(f"{what}: {e}") from e
