"""Which tensor goes into which new file, and where: the headers as they will be written. Pure."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hobbit_cpp._split import MAX_PARTS

from .errors import ConvertError
from .header import ALIGNMENT_KEY, TensorInfo, Value, i32_value, pad, string_value, u16_value, u32_value, write_header
from .plan import ALIGNMENT, Output

__all__ = ["SPLIT_MODEL_KEY", "FileLayout", "make_layout"]

SPLIT_MODEL_KEY = "hobbit.split.model"
"""The same hash of metadata and tensor table in all parts of a model: others are told from them."""
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class FileLayout:
    """One new file."""

    values: Mapping[str, Value]
    outputs: tuple[Output, ...]
    head: bytes
    """The header, without the padding that follows it."""

    @property
    def data_offset(self) -> int:
        """Where the tensor data begin."""
        return pad(len(self.head), ALIGNMENT)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.data_offset + sum(pad(o.n_bytes, ALIGNMENT) for o in self.outputs)

    @property
    def tensors(self) -> list[TensorInfo]:
        """The tensor table."""
        return [_info(o) for o in self.outputs]


def make_layout(outputs: Iterable[Output], values: Mapping[str, Value], max_bytes: int | None) -> list[FileLayout]:
    """Places `outputs` in one file, or in files of at most `max_bytes` as far as single tensors allow.

    As llama.cpp splits: the first file has the metadata, each has split.no, split.count and split.tensors.count. Ours also
    have SPLIT_MODEL_KEY.
    """
    all_outputs = list(outputs)
    groups = [all_outputs] if max_bytes is None else _groups(all_outputs, values, max_bytes)
    if len(groups) > MAX_PARTS:
        raise ConvertError(f"{len(groups)} parts are too many: at most {MAX_PARTS}; choose a larger size")
    model = hashlib.sha256(write_header(values, [_info(o) for o in all_outputs])).hexdigest()
    files = []
    for number, group in enumerate(groups):
        own: dict[str, Value] = dict(values) if number == 0 else {ALIGNMENT_KEY: u32_value(ALIGNMENT)}
        if len(groups) > 1:
            own.update(_split_values(number, len(groups), len(all_outputs), model))
        placed = tuple(_placed(group, number))
        files.append(FileLayout(own, placed, write_header(own, [_info(o) for o in placed])))
    return files


def _groups(outputs: list[Output], values: Mapping[str, Value], max_bytes: int) -> list[list[Output]]:
    groups: list[list[Output]] = []
    head = data = 0
    for output in outputs:
        row = len(write_header({}, [_info(output)])) - len(write_header({}, []))
        size = pad(output.n_bytes, ALIGNMENT)
        if not groups or (groups[-1] and pad(head + row, ALIGNMENT) + data + size > max_bytes):
            own = {**(values if not groups else {ALIGNMENT_KEY: u32_value(ALIGNMENT)}), **_split_values(0, 0, 0, _NO_HASH)}
            head, data = len(write_header(own, [])), 0
            groups.append([])
        groups[-1].append(output)
        head += row
        data += size
    return groups


def _split_values(number: int, count: int, n_tensors: int, model: str) -> dict[str, Value]:
    try:
        return {
            "split.no": u16_value(number),
            "split.count": u16_value(count),
            "split.tensors.count": i32_value(n_tensors),
            SPLIT_MODEL_KEY: string_value(model),
        }
    except struct.error as e:
        raise ConvertError(f"{count} parts, {n_tensors} tensors: too many") from e


def _placed(outputs: Iterable[Output], number: int) -> Iterable[Output]:
    offset = 0
    for output in outputs:
        yield replace(output, offset=offset, file=number)
        offset += pad(output.n_bytes, ALIGNMENT)


def _info(output: Output) -> TensorInfo:
    return TensorInfo(output.name, output.source.shape, output.type.id, output.offset)
