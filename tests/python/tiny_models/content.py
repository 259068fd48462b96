"""What tiny models are made of: vocabulary, random values, and their place in a GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Union

import gguf
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class U64:
    """An array of 64-bit integers in the metadata."""

    values: tuple[int, ...]


Value = Union[bool, int, float, str, List[int], List[float], U64]
Metadata = Dict[str, Value]

WORDS = ("the", "and", "of", "to", "in", "is", "that", "expert", "layer", "token")


@dataclass(frozen=True)
class Tensor:
    """A random tensor.

    Attributes:
        name: without ``blk.N.``
        shape: slowest axis first, so a matrix is (out, in)
        role: ``matrix``, ``expert`` (a stack in the asked-for type), or one of these in F32: ``router``, ``norm``
            (around one), ``bias``, ``decay`` (negative), ``plain`` (as a matrix)
        scale: factor on the usual standard deviation
    """

    name: str
    shape: tuple[int, ...]
    role: str = "matrix"
    scale: float = 1.0


def vocabulary(n_unused: int = 0) -> tuple[List[str], List[float], List[int]]:
    """SentencePiece-like tokens, scores and types that can spell any text, and some that no text has."""
    kinds = gguf.TokenType
    rows = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    rows += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    space = "\u2581"
    rows += [(c, kinds.NORMAL) for c in [space, *map(chr, range(0x21, 0x7F))]]
    # Merging goes pair by pair, so every prefix of a word is a token too.
    for word in WORDS:
        known = {text for text, _ in rows}
        prefixes = [space + word[:end] for end in range(1, len(word) + 1)]
        rows += [(p, kinds.NORMAL) for p in prefixes if p not in known]
    rows += [(f"{space}unused{i}", kinds.NORMAL) for i in range(n_unused)]
    texts, types = [text for text, _ in rows], [int(kind) for _, kind in rows]
    scores = [-float(i) if kind == kinds.NORMAL else 0.0 for i, kind in enumerate(types)]
    return texts, scores, types


def random_values(tensor: Tensor, rng: np.random.Generator) -> FloatArray:
    """Random weights that keep activations of size one."""
    noise = rng.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.role == "norm":
        noise *= np.float32(0.1 * tensor.scale)
        noise += 1.0
        return noise
    if tensor.role == "decay":
        values: FloatArray = -np.abs(noise)
        return values
    # Inputs of the router have size one: logits get a standard deviation of 1.5, so
    # that the largest weights differ clearly.
    gain = {"router": 1.5, "bias": 0.05 * tensor.shape[-1] ** 0.5}.get(tensor.role, 1.0)
    noise *= np.float32(gain * tensor.scale * tensor.shape[-1] ** -0.5)
    return noise


def add(
    writer: gguf.GGUFWriter,
    name: str,
    values: FloatArray,
    kind: gguf.GGMLQuantizationType,
) -> None:
    """Add a tensor in a storage type."""
    if kind == gguf.GGMLQuantizationType.I32:
        writer.add_tensor(name, np.abs(values * 1000).astype(np.int32) % 8)
    elif kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        try:
            data: npt.NDArray[Any] = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            raise ValueError(f"gguf cannot quantise to {kind.name}") from None
        writer.add_tensor(name, data, raw_dtype=kind)


def add_metadata(writer: gguf.GGUFWriter, prefix: str, metadata: Metadata) -> None:
    for key, value in metadata.items():
        name = key if key.startswith("tokenizer.") else f"{prefix}.{key}"
        # bool comes first: it is an int too.
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, U64):
            array = gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, list(value.values), array, sub_type=gguf.GGUFValueType.UINT64)
        else:
            writer.add_array(name, value)


def add_vocabulary(writer: gguf.GGUFWriter, n_unused: int = 0) -> int:
    """The tokenizer's metadata. Returns the number of tokens."""
    tokens, scores, types = vocabulary(n_unused)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    return len(tokens)
