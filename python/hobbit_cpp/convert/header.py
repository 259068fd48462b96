"""The header of a GGUF file: read with every length checked, values kept as the bytes they are.

The `gguf` package is not used for this: GGUFReader takes 8 s for a vocabulary of 150,000 (this: 0.4 s), refuses types
newer than itself, reports a truncated file as a numpy error; and its writer drops empty strings and arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from .errors import ConvertError

__all__ = [
    "ALIGNMENT_KEY",
    "Header",
    "TensorInfo",
    "Value",
    "i32_value",
    "pad",
    "read_header",
    "string_value",
    "strings_value",
    "u16_value",
    "u32_value",
    "write_header",
]

ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
GGML_MAX_DIMS = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_T_U16, _T_U32, _T_I32, _T_STRING, _T_ARRAY = 2, 4, 5, 8, 9
_READ_BYTES = 4 << 20


def pad(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return (n + alignment - 1) // alignment * alignment


@dataclass(frozen=True)
class Value:
    """A metadata value: its GGUF type and its bytes as they stand in the file."""

    type: int
    raw: bytes

    def scalar(self) -> int | float | bool | str | None:
        """The value of a number or string, None for an array."""
        if self.type == _T_STRING:
            return self.raw[8:].decode("utf-8", "replace")
        fmt = _SCALARS.get(self.type)
        if fmt is None:
            return None
        value: int | float | bool = fmt.unpack(self.raw)[0]
        return value


def u32_value(n: int) -> Value:
    """An unsigned 32-bit integer."""
    return Value(_T_U32, _U32.pack(n))


def u16_value(n: int) -> Value:
    """An unsigned 16-bit integer; struct.error when it is none."""
    return Value(_T_U16, _SCALARS[_T_U16].pack(n))


def i32_value(n: int) -> Value:
    """A signed 32-bit integer; struct.error when it is none."""
    return Value(_T_I32, _SCALARS[_T_I32].pack(n))


def string_value(text: str) -> Value:
    """A string."""
    data = text.encode()
    return Value(_T_STRING, _U64.pack(len(data)) + data)


def strings_value(texts: Sequence[str]) -> Value:
    """An array of strings."""
    return Value(_T_ARRAY, _U32.pack(_T_STRING) + _U64.pack(len(texts)) + b"".join(string_value(text).raw for text in texts))


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. `shape` is in ggml's order: the row length first."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    """From the start of the tensor data."""


@dataclass
class Header:
    """What stands before the tensor data."""

    values: dict[str, Value] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    data_offset: int = 0

    @property
    def alignment(self) -> int:
        """The alignment of tensor data."""
        return self.integer(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)

    def integer(self, key: str, default: int = 0) -> int:
        """An integer value, `default` where there is none."""
        value = self.values[key].scalar() if key in self.values else None
        return value if isinstance(value, int) else default

    def integers(self, key: str) -> list[int]:
        """An integer value or an array of them, [] where there is none."""
        value = self.values.get(key)
        if value is None or value.type != _T_ARRAY:
            return [self.integer(key)] if value is not None else []
        item = _SCALARS.get(_U32.unpack_from(value.raw)[0])
        if item is None:
            return []
        return [n for (n,) in item.iter_unpack(value.raw[12:]) if isinstance(n, int)]

    def strings(self, key: str) -> list[str]:
        """An array of strings, [] where there is none."""
        value = self.values.get(key)
        if value is None or value.type != _T_ARRAY or _U32.unpack_from(value.raw)[0] != _T_STRING:
            return []
        found, at = [], 12
        for _ in range(_U64.unpack_from(value.raw, 4)[0]):
            end = at + 8 + _U64.unpack_from(value.raw, at)[0]
            found.append(value.raw[at + 8 : end].decode("utf-8", "replace"))
            at = end
        return found

    def string(self, key: str, default: str = "") -> str:
        """A string value, `default` where there is none."""
        value = self.values[key].scalar() if key in self.values else None
        return value if isinstance(value, str) else default


class _Cursor:
    """Sequential reads from a file whose size is known; a length that goes past its end is an error."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file, self._name, self._size = file, name, size
        self._buffer = b""
        self._base = 0  # file offset of the buffer
        self.pos = 0

    def corrupt(self, what: str) -> ConvertError:
        return ConvertError(f"{self._name}: corrupt GGUF header ({what}, at byte {self.pos}): download the file again")

    def take(self, n: int) -> bytes:
        if n > self._size - self.pos:
            raise ConvertError(f"{self._name}: truncated in the header ({self._size} bytes): download the file again")
        start = self.pos - self._base
        if start + n > len(self._buffer):
            self._buffer = self._buffer[start:] + self._file.read(max(n, _READ_BYTES))
            self._base, start = self.pos, 0
            if n > len(self._buffer):
                raise ConvertError(f"{self._name}: became shorter while it was read")
        self.pos += n
        return self._buffer[start : start + n]

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def name(self) -> str:
        try:
            return self.take(self.u64()).decode()
        except UnicodeDecodeError:
            raise self.corrupt("a name that is not UTF-8") from None

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that take at least so many bytes each: nonsense is found before it is believed."""
        n = self.u64()
        if n * least_bytes > self._size:
            raise self.corrupt(f"{n} {what}")
        return n

    def value(self, kind: int, depth: int = 0) -> bytes:
        """The raw bytes of a value of type `kind`."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind].size)
        if kind == _T_STRING:
            length = self.take(8)
            return length + self.take(_U64.unpack(length)[0])
        if kind != _T_ARRAY or depth > 4:
            raise self.corrupt(f"value of type {kind}")
        item = self.u32()
        n = self.count("array elements", _SCALARS[item].size if item in _SCALARS else 8)
        head = _U32.pack(item) + _U64.pack(n)
        if item in _SCALARS:
            return head + self.take(n * _SCALARS[item].size)
        return head + b"".join([self.value(item, depth + 1) for _ in range(n)])


def read_header(file: BinaryIO, name: str, size: int) -> Header:
    """Reads the header of a GGUF of `size` bytes from the start of `file`; `name` is for messages."""
    cursor = _Cursor(file, name, size)
    if size < 4 or cursor.take(4) not in (b"GGUF", b"FUGG"):
        raise ConvertError(f"{name}: not a GGUF file: convert the model with llama.cpp's convert_hf_to_gguf.py first")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ConvertError(f"{name}: a big-endian GGUF: make it little-endian with gguf_convert_endian.py first")
    if version not in (2, 3):
        raise ConvertError(f"{name}: GGUF version {version}, but only 2 and 3 are read here")
    n_tensors = cursor.count("tensors", 24)
    n_values = cursor.count("metadata values", 13)

    header = Header()
    for _ in range(n_values):
        key = cursor.name()
        if key in header.values:
            raise cursor.corrupt(f"key {key!r} twice")
        kind = cursor.u32()
        header.values[key] = Value(kind, cursor.value(kind))
    names: set[str] = set()
    for _ in range(n_tensors):
        tensor = _read_tensor(cursor)
        if tensor.name in names:
            raise cursor.corrupt(f"tensor {tensor.name!r} twice")
        names.add(tensor.name)
        header.tensors.append(tensor)
    alignment = header.alignment
    if alignment <= 0 or alignment & (alignment - 1):
        raise cursor.corrupt(f"alignment {alignment}")
    header.data_offset = pad(cursor.pos, alignment)
    return header


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.name()
    n_dims = cursor.u32()
    if n_dims > GGML_MAX_DIMS:
        raise cursor.corrupt(f"{n_dims} dimensions of {name!r}")
    shape = tuple(cursor.u64() for _ in range(n_dims))
    if any(not 0 < n < 1 << 40 for n in shape):
        raise cursor.corrupt(f"shape {shape} of {name!r}")
    return TensorInfo(name, shape, cursor.u32(), cursor.u64())


def write_header(values: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """A GGUF version 3 header, without the padding that follows it."""
    out = [b"GGUF", _U32.pack(3), _U64.pack(len(tensors)), _U64.pack(len(values))]
    for key, value in values.items():
        out += [string_value(key).raw, _U32.pack(value.type), value.raw]
    for tensor in tensors:
        out += [string_value(tensor.name).raw, _U32.pack(len(tensor.shape))]
        out += [_U64.pack(n) for n in tensor.shape]
        out += [_U32.pack(tensor.type), _U64.pack(tensor.offset)]
    return b"".join(out)
