"""What becomes what: the tensors of the new file, their types, order and places. Pure: no files, no native code."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from .errors import ConvertError
from .ggtypes import TypeInfo, TypeTable

__all__ = ["ALIGNMENT", "LOW_PREFIX", "Output", "Plan", "Tensor", "counterparts", "is_expert", "make_plan"]

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
    offset: int = 0
    """From the start of the tensor data of its file: see layout.py."""
    file: int = 0
    """Which of the new files it goes into."""

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


def is_expert(name: str, shape: Sequence[int]) -> bool:
    """Whether this tensor holds the routed experts of a layer."""
    return _EXPERT.search(name) is not None and len(shape) == 3 and shape[2] > 1


def make_plan(
    tensors: Sequence[Tensor],
    types: TypeTable,
    high: str,
    low: str | None,
    *,
    low_from: Sequence[Tensor] | None = None,
    imatrix: Container[str] | None = None,
    sidecar: bool = False,
) -> Plan:
    """Plans a file with experts in two precisions.

    Args:
        tensors: Of the source.
        types: What ggml knows.
        high: Type of the experts; "keep": as they are.
        low: Type of the low-precision copies; None: no copies; "auto": for each tensor what is worth reading beside its high
            precision (`TypeTable.default_low`), or no copies where there is nothing for one of them.
        low_from: Tensors of another checkpoint, whose experts are the copies; `low` is not used then.
        imatrix: Names of the tensors that an importance matrix has data for.
        sidecar: Only the low-precision copies.
    """
    keep = high.lower() == "keep"
    low = None if low is None or low.lower() == "none" or low_from is not None else low
    notes: list[str] = []
    if any(t.name.startswith(LOW_PREFIX) for t in tensors):
        _check_converted(keep, sidecar)
        made = "and made anew from the high-precision ones" if low_from is None else "for those of the other file"
        notes.append("the input was converted before: its low-precision copies are dropped"
                     + (f" {made}" if low or low_from is not None else ""))  # fmt: skip
        tensors = [t for t in tensors if not t.name.startswith(LOW_PREFIX)]
    experts = sorted((t for t in tensors if is_expert(t.name, t.shape)), key=_place)
    if not experts:
        raise ConvertError(_no_experts(tensors))

    with_imatrix = imatrix is not None
    high_target = None if keep else types.target(high, with_imatrix)
    auto = low is not None and low.lower() == "auto"
    low_target = types.target(low, with_imatrix) if low and not auto else None
    highs = {t.name: t.type if high_target is None else _fit(types, high_target, t, notes) for t in experts}
    lows: dict[str, tuple[Tensor, TypeInfo]] = {}
    if low_from is not None:
        lows = {t.name: (t, t.type) for t in counterparts(experts, low_from)}
    elif auto:
        lows = _worthwhile(types, experts, highs, notes)
        if sidecar and not lows:
            raise ConvertError(f"{notes[-1]}; a sidecar would be empty")
    elif low_target is not None:
        lows = {t.name: (t, _fit(types, low_target, t, notes)) for t in experts}
    for t in experts:
        _check_high(t, highs[t.name], notes)
        if t.name in lows:
            _check_low(t, highs[t.name], lows[t.name][1], low_from is None)
    if low_from is not None:
        _check_smaller(experts, highs, lows, notes)
    if imatrix is not None:
        _check_imatrix([(t, k) for t in experts for k in _made(t, highs, lows)], imatrix, notes)

    outputs: list[Output] = []
    if not sidecar:
        outputs += [Output(t.name, t, t.type, "dense") for t in tensors if t.name not in highs]
    for layer in _layers(experts):
        if not sidecar:
            outputs += [Output(t.name, t, highs[t.name], "high") for t in layer]
        outputs += [Output(LOW_PREFIX + t.name, *lows[t.name], "low") for t in layer if t.name in lows]

    return Plan(
        outputs=tuple(outputs),
        high_type=_common(highs.values()),
        low_type=_common(kind for _, kind in lows.values()),
        notes=tuple(dict.fromkeys(notes)),
        n_layers=len(_layers(experts)),
        n_experts=max(t.shape[2] for t in experts),
    )


def counterparts(experts: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The tensor of another checkpoint for each of `experts`; ConvertError when one is missing or has another shape."""
    by_name = {t.name: t for t in others}
    found = []
    for t in experts:
        other = by_name.get(t.name)
        if other is None:
            raise ConvertError(f"the file for the low precision has no {t.name}: it is not a checkpoint of the same model")
        if other.shape != t.shape:
            raise ConvertError(
                f"{t.name} has the shape {list(t.shape)}, in the file for the low precision {list(other.shape)}: "
                "it is not a checkpoint of the same model"
            )
        found.append(other)
    return found


def _check_converted(keep: bool, sidecar: bool) -> None:
    if sidecar:
        raise ConvertError(
            "the input has low-precision copies already, so there is nothing for a sidecar: convert the original file"
        )
    if not keep:
        raise ConvertError(
            "the input was converted before: use --high keep to make its low-precision copies anew, or convert the original file"
        )


def _made(tensor: Tensor, highs: dict[str, TypeInfo], lows: dict[str, tuple[Tensor, TypeInfo]]) -> list[TypeInfo]:
    """The types that `tensor` itself is quantised to."""
    kinds = [highs[tensor.name]]
    if tensor.name in lows and lows[tensor.name][0] is tensor:
        kinds.append(lows[tensor.name][1])
    return [kind for kind in kinds if kind is not tensor.type]


def _check_imatrix(made: Sequence[tuple[Tensor, TypeInfo]], imatrix: Container[str], notes: list[str]) -> None:
    """Tensors without data: refused where the type needs them, else noted."""
    without = [(t, kind) for t, kind in made if t.name not in imatrix]
    for t, kind in without:
        if kind.needs_imatrix:
            raise ConvertError(
                f"the importance matrix has no data for {t.name}, and {kind.name} needs it: was it made with this model?"
            )
    names = list(dict.fromkeys(t.name for t, _ in without))
    if names:
        notes.append(
            f"the importance matrix has no data for {len(names)} expert tensors ({names[0]}"
            + (", ...)" if len(names) > 1 else ")")
            + ": quantised without"
        )


def _check_smaller(
    experts: Sequence[Tensor], highs: dict[str, TypeInfo], lows: dict[str, tuple[Tensor, TypeInfo]], notes: list[str]
) -> None:
    """Mixtures need not be smaller in every tensor, but on the whole."""
    high = sum(t.bytes_as(highs[t.name]) for t in experts)
    low = sum(t.n_bytes for t, _ in lows.values())
    if low >= high:
        raise ConvertError(
            f"the experts of the file for the low precision ({_common(k for _, k in lows.values())}, {low} bytes) are not "
            f"smaller than those in high precision ({_common(highs.values())}, {high} bytes): were the two files swapped?"
        )
    larger = [t.name for t in experts if lows[t.name][1].bits >= highs[t.name].bits]
    if larger:
        notes.append(f"the low precision of {len(larger)} tensors is not smaller than the high one: {larger[0]}"
                     + (", ..." if len(larger) > 1 else ""))  # fmt: skip


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


def _worthwhile(
    types: TypeTable, experts: Sequence[Tensor], highs: dict[str, TypeInfo], notes: list[str]
) -> dict[str, tuple[Tensor, TypeInfo]]:
    """The default low precision of each tensor; none at all when one has none, since copies are of use only together."""
    lows: dict[str, tuple[Tensor, TypeInfo]] = {}
    for t in experts:
        high = highs[t.name]
        low = types.default_low(high, t.row)
        if low is None:
            notes.append(
                f"no low-precision copies: beside {high.name} in rows of {t.row} (of {t.name}) no smaller type is worth reading; "
                "--low TYPE makes copies all the same"
            )
            return {}
        lows[t.name] = (t, low)
    return lows


def _check_high(tensor: Tensor, high: TypeInfo, notes: list[str]) -> None:
    if not high.computable:
        raise ConvertError(f"{tensor.name}: ggml cannot multiply by experts of type {high.name}: use --high Q8_0")
    if high.bits > tensor.type.bits:
        notes.append(f"--high {high.name} is larger than the {tensor.type.name} of the input and no more precise: "
                     "--high keep is better")  # fmt: skip


def _check_low(tensor: Tensor, high: TypeInfo, low: TypeInfo, must_be_smaller: bool) -> None:
    if not low.computable:
        raise ConvertError(f"{tensor.name}: ggml cannot multiply by experts of type {low.name}: use another file")
    if must_be_smaller and low.bits >= high.bits:
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
