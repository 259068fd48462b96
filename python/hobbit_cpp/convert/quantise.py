"""Quantising and dequantising by ggml's own code. cffi gives up the GIL, so threads truly run side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConvertError
from .ggtypes import TypeInfo

__all__ = ["Quantiser"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Quantiser:
    """The quantisation calls of the C API. Safe from several threads."""

    def __init__(self) -> None:
        from hobbit_cpp._lib import core

        self._ffi, self._lib = core()

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

    def quantise(self, kind: TypeInfo, values: Floats, out: Bytes, row: int, what: str) -> None:
        """`values`, whole rows of `row` floats, into `out`, stored as `kind`."""
        error = self._ffi.new("hobbit_error *")
        status = self._lib.hobbit_quantize(
            kind.id,
            self._pointer("float[]", values),
            self._pointer("char[]", out),
            values.size // row,
            row,
            self._ffi.NULL,
            error,
        )
        self._check(status, error, what)

    def _pointer(self, ctype: str, array: npt.NDArray[Any]) -> Any:
        return self._ffi.from_buffer(ctype, array)

    def _check(self, status: int, error: Any, what: str) -> None:
        if status != 0:
            raise ConvertError(f"{what}: {self._ffi.string(error.message).decode('utf-8', 'replace')}")
