"""What becomes what: the tensors of the new file, their types, order and places. Pure: no files, no native code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import ConvertError
from .ggtypes import TypeInfo, TypeTable
from .header import pad

__all__ = ["ALIGNMENT", "LOW_PREFIX", "Output", "Plan", "Tensor", "is_expert", "make_plan"]

# Of tensor data in the new file: a page, so that every tensor can be read directly.
ALIGNMENT = 4096
LOW_PREFIX = "hobbit.low."
# GGML_MAX_NAME without the NUL.
MAX_NAME = 63

_EXPERT = re.compile(r"_(ch)?exps\.weight$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
# Old files have one matrix per expert: blk.0.ffn_up.3.weight
_SINGLE_EXPERT = re.compile(r"^blk\.\d+\.ffn_\w+\.\d+\.weight$")
_PROJECTIONS = ("_gate_up_", "_up_", "_gate_", "_down_")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the source. `shape` is in ggml's order."""

    name: str
    shape: tuple[int, ...]
    type: TypeInfo
    part: int = 0
    """Which file of a split model."""
    offset: int = 0
    """In that file."""

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.shape[0] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows, over all experts."""
        n = 1
        for dim in self.shape[1:]:
            n *= dim
        return n

    @property
    def n_bytes(self) -> int:
        """Bytes of data."""
        return self.bytes_as(self.type)

    def bytes_as(self, kind: TypeInfo) -> int:
        """Bytes of data when stored as `kind`."""
        return self.n_rows * kind.row_bytes(self.row)


@dataclass(frozen=True)
class Output:
    """A tensor of the new file."""

    name: str
    source: Tensor
    type: TypeInfo
    role: str
    """"dense", "high" or "low"."""
    offset: int
    """From the start of the tensor data."""

    @property
    def n_bytes(self) -> int:
        """Bytes of data."""
        return self.source.bytes_as(self.type)


@dataclass(frozen=True)
class Plan:
    """The new file."""

    outputs: tuple[Output, ...]
    high_type: str
    low_type: str
    notes: tuple[str, ...]
    """What the user should know, a line each: fallbacks, losses."""
    n_layers: int
    n_experts: int

    def role_bytes(self, role: str) -> int:
        """Bytes of all tensors of a role."""
        return sum(o.n_bytes for o in self.outputs if o.role == role)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensor data, padding included."""
        return sum(pad(o.n_bytes, ALIGNMENT) for o in self.outputs)


def is_expert(name: str, shape: Sequence[int]) -> bool:
    """Whether this tensor holds the routed experts of a layer."""
    return _EXPERT.search(name) is not None and len(shape) == 3 and shape[2] > 1


def make_plan(tensors: Sequence[Tensor], types: TypeTable, high: str, low: str | None) -> Plan:
    """Plans a file with experts in type `high` ("keep": as they are) and copies in type `low` (None: no copies)."""
    converted = any(t.name.startswith(LOW_PREFIX) for t in tensors)
    keep = high.lower() == "keep"
    low = None if low is None or low.lower() == "none" else low
    notes: list[str] = []
    if converted:
        if not keep:
            raise ConvertError(
                "the input was converted before: use --high keep to make its low-precision copies anew, "
                "or convert the original file"
            )
        notes.append("the input was converted before: its low-precision copies are dropped"
                     + (" and made anew from the high-precision ones" if low else ""))  # fmt: skip
        tensors = [t for t in tensors if not t.name.startswith(LOW_PREFIX)]
    experts = sorted((t for t in tensors if is_expert(t.name, t.shape)), key=_place)
    if not experts:
        raise ConvertError(_no_experts(tensors))

    high_target = None if keep else types.target(high)
    low_target = types.target(low) if low else None
    highs = {t.name: t.type if high_target is None else _fit(types, high_target, t, notes) for t in experts}
    lows = {} if low_target is None else {t.name: _fit(types, low_target, t, notes) for t in experts}
    for t in experts:
        _check_pair(t, highs[t.name], lows.get(t.name), notes)

    outputs: list[Output] = []
    offset = 0

    def add(name: str, source: Tensor, kind: TypeInfo, role: str) -> None:
        nonlocal offset
        outputs.append(Output(name, source, kind, role, offset))
        offset += pad(source.bytes_as(kind), ALIGNMENT)

    for t in tensors:
        if t.name not in highs:
            add(t.name, t, t.type, "dense")
    for layer in _layers(experts):
        for t in layer:
            add(t.name, t, highs[t.name], "high")
        for t in layer:
            if t.name in lows:
                add(LOW_PREFIX + t.name, t, lows[t.name], "low")

    return Plan(
        outputs=tuple(outputs),
        high_type=_common(highs.values()),
        low_type=_common(lows.values()),
        notes=tuple(dict.fromkeys(notes)),
        n_layers=len(_layers(experts)),
        n_experts=max(t.shape[2] for t in experts),
    )


def _place(tensor: Tensor) -> tuple[int, int, str]:
    """Sorts experts by block, then by projection."""
    block = _BLOCK.match(tensor.name)
    order = next((i for i, p in enumerate(_PROJECTIONS) if p in tensor.name), len(_PROJECTIONS))
    return int(block.group(1)) if block else -1, order, tensor.name


def _layers(experts: Sequence[Tensor]) -> list[list[Tensor]]:
    layers: dict[int, list[Tensor]] = {}
    for t in experts:
        layers.setdefault(_place(t)[0], []).append(t)
    return list(layers.values())


def _fit(types: TypeTable, wanted: TypeInfo, tensor: Tensor, notes: list[str]) -> TypeInfo:
    fitted = types.fit(wanted, tensor.row)
    if fitted is None:
        raise ConvertError(f"{tensor.name}: no type has a block that divides rows of {tensor.row}")
    if fitted is not wanted:
        notes.append(
            f"{wanted.name} has blocks of {wanted.block}, which do not divide rows of {tensor.row}: "
            f"{fitted.name} instead ({fitted.bits:g} bits per weight for {wanted.bits:g})"
        )
    return fitted


def _check_pair(tensor: Tensor, high: TypeInfo, low: TypeInfo | None, notes: list[str]) -> None:
    if not high.computable:
        raise ConvertError(f"{tensor.name}: ggml cannot multiply by experts of type {high.name}: use --high Q8_0")
    if high.bits > tensor.type.bits:
        notes.append(f"--high {high.name} is larger than the {tensor.type.name} of the input and no more precise: "
                     "--high keep is better")  # fmt: skip
    if low is None:
        return
    if low.bits >= high.bits:
        raise ConvertError(
            f"{tensor.name}: the low precision {low.name} ({low.bits:g} bits per weight) is not smaller than the high "
            f"precision {high.name} ({high.bits:g}): choose a smaller --low, a larger --high, or --low none"
        )
    if len((LOW_PREFIX + tensor.name).encode()) > MAX_NAME:
        raise ConvertError(f"{tensor.name}: the name is too long for a low-precision copy ({MAX_NAME} bytes at most)")


def _common(kinds: Iterable[TypeInfo]) -> str:
    names = {kind.name for kind in kinds}
    return "mixed" if len(names) > 1 else "".join(names) or "none"


def _no_experts(tensors: Sequence[Tensor]) -> str:
    if any(_SINGLE_EXPERT.match(t.name) for t in tensors):
        return (
            "an old MoE file with one tensor per expert: make it again from the original weights "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    return "a dense model, not a Mixture of Experts: there are no routed experts to convert"
