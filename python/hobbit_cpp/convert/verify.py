"""Checks a file that was just written, by reading it again."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from .errors import ConvertError
from .ggtypes import TypeInfo, TypeTable
from .plan import Output
from .quantise import NEGLIGIBLE, Bytes, Quantiser
from .source import Source, Sources
from .target import NewFile
from .writer import drop_cached

__all__ = ["verify"]

_SAMPLE_ELEMENTS = 1 << 14


def verify(files: Sequence[NewFile], source: Sources, types: TypeTable, quantiser: Quantiser) -> None:
    """ConvertError unless the files have the headers that were planned and, in samples, the data."""
    with Source(files[0].path, types, parts=[file.partial for file in files]) as made:
        for part, (file, header) in enumerate(zip(files, made.headers)):
            layout = file.layout
            if header.tensors != layout.tensors or header.values != layout.values:
                raise ConvertError(f"{file.path}: the header that was written does not read back: please report this")
            size = os.fstat(file.fd).st_size
            if size != layout.size:
                raise ConvertError(f"{file.path}: {size} bytes long, {layout.size} expected")
            for output in layout.outputs:
                step = max(1, _SAMPLE_ELEMENTS // output.source.row)
                last = max(0, output.source.n_rows - step)
                # the ends show a misplaced tensor, the middle a misplaced chunk
                for first in sorted({0, last // 2, last}):
                    n = min(step, output.source.n_rows - first)
                    _check_rows(made, part, source, quantiser, output, layout.data_offset, first, n)
            drop_cached(file.fd)  # the ends of pages of which a part was read


def _read(source: Source | Sources, part: int, offset: int, kind: TypeInfo, row: int, n_rows: int) -> Bytes:
    data = np.empty(n_rows * kind.row_bytes(row), np.uint8)
    source.read(part, offset, data.data)
    return data


def _check_rows(
    made: Source, part: int, source: Sources, quantiser: Quantiser, output: Output, data_offset: int, first: int, n_rows: int
) -> None:
    tensor, kind = output.source, output.type
    row = tensor.row
    theirs = _read(source, tensor.part, tensor.offset + first * tensor.type.row_bytes(row), tensor.type, row, n_rows)
    ours = _read(made, part, data_offset + output.offset + first * kind.row_bytes(row), kind, row, n_rows)
    if kind is tensor.type:
        if not np.array_equal(ours, theirs):
            raise ConvertError(f"{output.name}: what was written is not what was read: check the disk, convert again")
        return
    before = np.empty(n_rows * row, np.float32)
    quantiser.to_float(tensor.type, theirs, before, tensor.name)
    again = np.empty_like(ours)
    quantiser.quantise_rows(kind, before, again, tensor, first)
    if not np.array_equal(ours, again):
        raise ConvertError(f"{output.name}: what was written is not what was made: check the disk, convert again")
    after = np.empty_like(before)
    quantiser.to_float(kind, ours, after, output.name)
    norm = max(float(np.linalg.norm(before)), NEGLIGIBLE * before.size**0.5)
    error = float(np.linalg.norm(after - before))
    if not error <= error_limit(kind) * norm:
        raise ConvertError(f"{output.name}: {kind.name} is too far from the source (relative error {error / norm:.3g})")


def error_limit(kind: TypeInfo) -> float:
    """The largest relative error (of norms) that `kind` can be blamed for, with outliers in every block."""
    if kind.bits >= 7:
        return 0.03
    return 0.5 if kind.bits >= 3 else 1.0 if kind.bits >= 2.5 else 2.0
