"""Writes a file of random weights: streaming, as fast as the disk takes it, in little memory.

Quantising gigabytes of noise would take an hour. Instead some rows of each length are drawn and quantised once, by
ggml's own code, and every tensor is made of these rows in an order of its own. So values have a mean of zero and a size
that keeps activations finite, whatever the type; and a low-precision copy, which takes the same rows, is truly the copy
of its expert.
"""

from __future__ import annotations

import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import numpy.typing as npt

import hobbit_cpp
from hobbit_cpp._progress import StepProgress, make_progress
from hobbit_cpp.bench.sizes import RANDOM_WEIGHTS_KEY
from hobbit_cpp.convert.errors import ConvertError
from hobbit_cpp.convert.ggtypes import TypeInfo, TypeTable, load_types
from hobbit_cpp.convert.header import ALIGNMENT_KEY, Value, string_value, u32_value
from hobbit_cpp.convert.layout import make_layout
from hobbit_cpp.convert.plan import ALIGNMENT, Output, Plan, Tensor, make_plan
from hobbit_cpp.convert.quantise import Quantiser
from hobbit_cpp.convert.target import NewFile, check_targets, writing
from hobbit_cpp.convert.writer import flush, write_fully

from .shapes import SHAPES, Number, Shape, Weight, metadata, weights
from .vocabulary import vocabulary

__all__ = ["ShapeReport", "make"]

_BANK_ELEMENTS = 1 << 20
_CHUNK_BYTES = 4 << 20
_SYNC_BYTES = 256 << 20
# Inputs of a router have size one: logits of this size make the largest weights differ clearly.
_ROUTER_GAIN = 1.5
_BIAS_SIZE = 0.02

# llama-quant.cpp, tensor_type_fallback
_STAND_INS = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShapeReport:
    """What was written."""

    path: Path
    bytes_file: int
    high_type: str
    low_type: str
    notes: Tuple[str, ...]
    seconds: float


class _Bank:
    """Rows to make tensors of, by type, length and size of the values."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._quantiser = Quantiser()
        self._rows: Dict[Tuple[int, int, float], Bytes] = {}

    def rows(self, kind: TypeInfo, n: int, size: float) -> Bytes:
        """[rows, bytes of a row]; the same values for every type."""
        key = (kind.id, n, size)
        if key not in self._rows:
            rng = np.random.default_rng([self._seed, n])
            values = rng.standard_normal((max(64, _BANK_ELEMENTS // n), n), dtype=np.float32) * np.float32(size)
            out = np.empty((len(values), kind.row_bytes(n)), np.uint8)
            self._quantiser.prepare(kind)
            self._quantiser.quantise(kind, values.reshape(-1), out.reshape(-1), n, f"rows of {n}")
            self._rows[key] = out
        return self._rows[key]


def make(
    like: str,
    out: Path,
    *,
    high: Optional[str] = None,
    low: Optional[str] = None,
    dense: str = "Q8_0",
    layers: Optional[int] = None,
    seed: int = 0,
    force: bool = False,
    progress: Optional[bool] = None,
) -> ShapeReport:
    """Writes a file with the shapes of the model `like` (a key of `SHAPES`).

    Args:
        high: type of the experts, None: what files of this model usually have.
        low: type of low-precision copies, None: no copies.
        dense: type of the other matrices.
        layers: how many; all by default.
        force: replace `out`.
        progress: True: on stderr; False: none; None: on a terminal.

    Raises:
        ConvertError: One line that says what to do.
    """
    start = time.monotonic()
    shape = SHAPES[like]
    n_layer = shape.n_layer if layers is None else layers
    if not shape.dense_layers < n_layer <= shape.n_layer:
        raise ConvertError(f"{like} has {shape.n_layer} layers: give {shape.dense_layers + 1} to {shape.n_layer}")
    check_targets([out], [], force)
    types = load_types()
    plan, roles = _plan(shape, n_layer, types, high or shape.experts, low, dense)
    layout = make_layout(plan.outputs, _metadata(like, shape, n_layer, plan), None)
    with writing([out], layout, force) as (made,):
        bar = make_progress("writing", "bytes", progress)
        try:
            _write_tensors(made, roles, seed, bar)
        finally:
            bar.close()
    return ShapeReport(out, layout[0].size, plan.high_type, plan.low_type, plan.notes, time.monotonic() - start)


def _plan(shape: Shape, n_layer: int, types: TypeTable, high: str, low: Optional[str], dense: str) -> Tuple[Plan, Dict[str, str]]:
    """The places of all tensors, as a conversion gives them, and the role of each."""
    f32 = types.by_name["F32"]
    wanted = {"expert": types.target(high), "matrix": types.target(dense), "embedding": types.target(dense)}
    notes: List[str] = []
    tensors = []
    roles = {}
    for w in weights(shape, n_layer):
        kind = f32
        if w.role in wanted:
            kind = _fit(types, wanted[w.role], w, notes)
        tensors.append(Tensor(w.name, w.shape, kind))
        roles[w.name] = w.role
    plan = make_plan(tensors, types, "keep", low)
    notes += plan.notes
    return Plan(plan.outputs, plan.high_type, plan.low_type, tuple(dict.fromkeys(notes)), plan.n_layers, plan.n_experts), roles


def _fit(types: TypeTable, wanted: TypeInfo, weight: Weight, notes: List[str]) -> TypeInfo:
    """The type that llama.cpp's own quantiser puts in the place of one whose blocks do not divide the rows."""
    row = weight.shape[0]
    stand_in = types.by_name.get(_STAND_INS.get(wanted.name, ""))
    fitted = wanted if row % wanted.block == 0 else stand_in if stand_in and row % stand_in.block == 0 else types.fit(wanted, row)
    if fitted is None:
        raise ConvertError(f"{weight.name}: no type has a block that divides rows of {row}")
    if fitted is not wanted:
        notes.append(f"{wanted.name} has blocks of {wanted.block}, which do not divide rows of {row}: {fitted.name} there")
    return fitted


def _value(value: Number) -> Value:
    if isinstance(value, bool):
        return Value(7, struct.pack("<?", value))
    if isinstance(value, int):
        return u32_value(value)
    if isinstance(value, float):
        return Value(6, struct.pack("<f", value))
    return string_value(value)


def _metadata(like: str, shape: Shape, n_layer: int, plan: Plan) -> Dict[str, Value]:
    keys: Dict[str, Number] = {
        "general.architecture": shape.arch,
        "general.name": f"{like}, random weights" + ("" if n_layer == shape.n_layer else f", {n_layer} layers"),
        "general.quantization_version": 2,
        ALIGNMENT_KEY: ALIGNMENT,
        **metadata(shape, n_layer),
        "hobbit.version": 1,
        "hobbit.high_type": plan.high_type,
        "hobbit.low_type": plan.low_type,
        "hobbit.converter": f"hobbit-cpp {hobbit_cpp.__version__}",
        RANDOM_WEIGHTS_KEY: True,
    }
    return {**{key: _value(value) for key, value in keys.items()}, **vocabulary(shape.n_vocab)}


def _write_tensors(made: NewFile, roles: Dict[str, str], seed: int, bar: StepProgress) -> None:
    bank = _Bank(seed)
    written = synced = 0
    for output in made.layout.outputs:
        for place, data in _pieces(output, roles[output.source.name], bank, seed):
            write_fully(made.fd, data, made.layout.data_offset + output.offset + place)
            written += len(data)
            if written - synced >= _SYNC_BYTES:
                synced = written
                flush(made.fd)  # bounds the dirty pages
                bar.update(written, made.layout.size)
    flush(made.fd)
    bar.update(written, made.layout.size)


def _pieces(output: Output, role: str, bank: _Bank, seed: int) -> Any:
    """(place in the tensor, bytes), piece by piece."""
    tensor = output.source
    # of the source's name: a low copy takes the rows of its expert
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if role in ("norm", "bias"):
        noise = rng.standard_normal(tensor.row * tensor.n_rows, dtype=np.float32)
        data = np.ones_like(noise) if role == "norm" else noise * np.float32(_BIAS_SIZE)
        yield 0, data.astype("<f4").view(np.uint8).data
        return
    gain = {"embedding": tensor.row**0.5, "router": _ROUTER_GAIN}.get(role, 1.0)
    rows = bank.rows(output.type, tensor.row, gain * tensor.row**-0.5)
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    room = np.empty((min(step, tensor.n_rows), rows.shape[1]), np.uint8)
    for first in range(0, tensor.n_rows, step):
        n = min(step, tensor.n_rows - first)
        np.take(rows, rng.integers(0, len(rows), n), axis=0, out=room[:n])
        yield first * rows.shape[1], room[:n].reshape(-1).data
