"""Whether two files are checkpoints of the same model, in different precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import ConvertError
from .header import Header
from .plan import Tensor
from .quantise import NEGLIGIBLE, Floats, Quantiser
from .source import Source, Sources

__all__ = ["check_same_model", "check_same_weights", "correlation_limit"]

_TOKENS = "tokenizer.ggml.tokens"
# Sizes of the architecture that must agree where both files have them.
_SIZES = ("block_count", "embedding_length", "expert_count", "expert_used_count", "expert_feed_forward_length")
_SAMPLE_EXPERTS = 4
_SAMPLE_ELEMENTS = 1 << 14


def check_same_model(high: Source, low: Source) -> None:
    """ConvertError unless architecture, sizes and vocabulary agree."""
    ours, theirs = high.header, low.header
    arch = ours.string("general.architecture")
    _must_agree(low, "architecture", arch, theirs.string("general.architecture"))
    for size in _SIZES:
        key = f"{arch}.{size}"
        if key in ours.values and key in theirs.values:
            _must_agree(low, size, ours.values[key].scalar(), theirs.values[key].scalar())
    if ours.values.get(_TOKENS) != theirs.values.get(_TOKENS):
        raise ConvertError(f"{low.path} is of another model: {_first_difference(ours, theirs)}")


def _must_agree(low: Source, what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ConvertError(f"{low.path} is of another model: its {what} is {theirs}, not {ours}")


def _first_difference(ours: Header, theirs: Header) -> str:
    a, b = ours.strings(_TOKENS), theirs.strings(_TOKENS)
    if len(a) != len(b):
        return f"its vocabulary has {len(b)} tokens, not {len(a)}"
    i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
    return f"token {i} of its vocabulary is {b[i]!r}, not {a[i]!r}" if a else "its vocabulary is stored in another way"


def correlation_limit(high: Tensor, low: Tensor) -> float:
    """The least correlation of the same weights in two types. On Gaussian weights ggml's types of 3 bits and more keep above
    .97 of the original, IQ1_S .89; weights of different models have about 0."""
    return 0.9 if min(high.type.bits, low.type.bits) >= 3 else 0.7


def check_same_weights(pairs: Sequence[tuple[Tensor, Tensor]], source: Sources, quantiser: Quantiser) -> None:
    """ConvertError unless the experts of each pair of tensors correlate, in samples."""
    for high, low in pairs:
        n_expert, n_rows = high.shape[2], high.shape[1]
        n = min(n_rows, max(1, _SAMPLE_ELEMENTS // high.row))
        for i, expert in enumerate(sorted({n_expert * k // _SAMPLE_EXPERTS for k in range(_SAMPLE_EXPERTS)} | {n_expert - 1})):
            # from another part of the matrix each time
            first = expert * n_rows + (n_rows - n) * i // _SAMPLE_EXPERTS
            a = _rows(high, source, quantiser, first, n)
            b = _rows(low, source, quantiser, first, n)
            r = _correlation(a, b)
            if not r >= correlation_limit(high, low):
                raise ConvertError(
                    f"{high.name}: expert {expert} of the two files has different weights (correlation "
                    f"{r:.3f} of {high.type.name} with {low.type.name}, at least {correlation_limit(high, low):g} expected): "
                    "they are not checkpoints of the same model"
                )


def _rows(tensor: Tensor, source: Sources, quantiser: Quantiser, first: int, n: int) -> Floats:
    data = np.empty(n * tensor.type.row_bytes(tensor.row), np.uint8)
    source.read(tensor.part, tensor.offset + first * tensor.type.row_bytes(tensor.row), data.data)
    out = np.empty(n * tensor.row, np.float32)
    quantiser.to_float(tensor.type, data, out, tensor.name)
    return out


def _correlation(a: Floats, b: Floats) -> float:
    """The cosine between two samples, which are about zero on average; 0 when their sizes differ by more than a factor of 2."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    nx, ny = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if max(nx, ny) <= NEGLIGIBLE * x.size**0.5:
        return 1.0
    if min(nx, ny) * 2 < max(nx, ny):
        return 0.0
    return float(x @ y) / (nx * ny)
