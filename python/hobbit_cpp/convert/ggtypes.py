"""The tensor types ggml knows, as plain data, so that planning needs no native code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ConvertError

__all__ = ["TypeInfo", "TypeTable", "load_types"]

# ggml's enum has gaps and grows; ids far beyond it do not exist.
_MAX_TYPE_ID = 256

# A type stands in for another only when it is meant for ordinary weights. Left out: the ternary and binary types (Q1_0,
# Q2_0, TQ1_0, TQ2_0), which suit models trained for them, the micro-scaling formats (MXFP4, NVFP4), and activations.
# Of two types of the same size the one further left is taken.
_FALLBACK_ORDER = (
    "F16", "BF16", "F32", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K",
    "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ1_M",
)  # fmt: skip

# Low-precision copies by the bits per weight of the high precision, the better first: measured for Q8_0 and Q4_K, see
# docs/low-types.md, in between by the share of the bytes. What is hardly smaller than the high precision saves too little.
_LOW = ((8.0, ("IQ4_NL",)), (5.0, ("Q3_K", "IQ4_NL")), (4.0, ("Q2_K",)))
_MOST_OF_HIGH = 0.7


@dataclass(frozen=True)
class TypeInfo:
    """One ggml type."""

    id: int
    name: str
    block: int
    """Elements of a block."""
    block_bytes: int
    needs_imatrix: bool
    computable: bool
    """ggml can multiply by a matrix of this type."""

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.block_bytes * 8 / self.block

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` elements, which the block must divide."""
        return n // self.block * self.block_bytes


class TypeTable:
    """All types, by id and by name in any case."""

    def __init__(self, types: Iterable[TypeInfo]) -> None:
        self.by_id = {t.id: t for t in types}
        self.by_name = {t.name.upper(): t for t in self.by_id.values()}

    def get(self, type_id: int) -> TypeInfo | None:
        """The type of this number; None for one that this ggml does not know."""
        return self.by_id.get(type_id)

    def target(self, name: str, imatrix: bool = False) -> TypeInfo:
        """The type called `name`, to quantise to (with an importance matrix); ConvertError when that cannot be done."""
        info = self.by_name.get(name.upper())
        usable = ", ".join(t.name for t in self.targets(imatrix))
        if info is None:
            raise ConvertError(f"unknown type {name!r}: use one of {usable}")
        if info.needs_imatrix and not imatrix:
            raise ConvertError(
                f"{info.name} needs an importance matrix: give one with --imatrix (`hobbit imatrix` makes it), "
                f"or use one of {usable}"
            )
        if info not in self.targets(imatrix):
            raise ConvertError(f"experts cannot be stored as {info.name}: use one of {usable}")
        return info

    def targets(self, imatrix: bool = False) -> list[TypeInfo]:
        """Types to quantise to (with an importance matrix), most bits first."""
        good = [t for t in self.by_id.values() if t.computable and (imatrix or not t.needs_imatrix)]
        return sorted(good, key=lambda t: (-t.bits, t.id))

    def fit(self, wanted: TypeInfo, row: int) -> TypeInfo | None:
        """`wanted` if its block divides `row`, else the type nearest in bits per weight whose block does."""
        if row % wanted.block == 0:
            return wanted
        candidates = [
            t
            for name in _FALLBACK_ORDER
            for t in (self.by_name.get(name),)
            if t is not None and t.computable and not t.needs_imatrix and row % t.block == 0
        ]
        return min(candidates, key=lambda t: abs(t.bits - wanted.bits), default=None)

    def default_low(self, high: TypeInfo, row: int) -> TypeInfo | None:
        """What low-precision copies of experts of type `high` are worth reading as; None: nothing that `row` allows is."""
        names = next((names for least, names in _LOW if high.bits >= least), ())
        fitting = (self.by_name[name] for name in names if row % self.by_name[name].block == 0)
        return next((t for t in fitting if t.bits <= _MOST_OF_HIGH * high.bits), None)


def load_types() -> TypeTable:
    """The types of the ggml that this package was built with."""
    from hobbit_cpp._lib import core

    ffi, lib = core()
    types = []
    info = ffi.new("hobbit_type_info *")
    info.struct_size = ffi.sizeof("hobbit_type_info")
    for type_id in range(_MAX_TYPE_ID):
        if lib.hobbit_type(type_id, info):
            types.append(
                TypeInfo(
                    id=type_id,
                    name=ffi.string(info.name).decode().upper(),
                    block=int(info.block),
                    block_bytes=int(info.block_bytes),
                    needs_imatrix=bool(info.needs_imatrix),
                    computable=bool(info.computable),
                )
            )
    return TypeTable(types)
