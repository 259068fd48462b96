"""Write tiny models."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import List, Tuple

import gguf
import numpy as np

from .architectures import ARCHITECTURES, OPTIONAL, Architecture, common
from .content import Metadata, Tensor, add, add_metadata, add_vocabulary, random_values, vocabulary
from .shapes import N_HEAD, SHAPES, Sizes
from .tensors import tensors_of

CONTEXT = 512

# First match counts. What is not here is a plain matrix.
_ROLES = (
    (r".*norm.*\.weight|.*\.scale|layer_output_scale\.weight", "norm"),
    (r".*_(ch)?exps\.weight", "expert"),
    (r"ffn_gate_inp\.weight", "router"),
    (r"ssm_a(\.weight)?", "decay"),
    (r".*\.bias", "bias"),
    (r"ffn_gate_tid2eid\.weight", "ids"),
)


def _write(
    path: Path,
    name: str,
    arch: str,
    metadata: Metadata,
    tensors: List[Tuple[str, Tensor]],
    expert_type: str,
    dense_type: str,
    seed: int,
    twice: bool = False,
    n_unused: int = 0,
) -> None:
    """`tensors`: prefix (`blk.N.`) and tensor, in the order of the file."""
    kind_of = gguf.GGMLQuantizationType
    types = {"matrix": kind_of[dense_type], "expert": kind_of[expert_type.upper()], "ids": kind_of.I32}
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {name}")
    n_vocab = add_vocabulary(writer, n_unused)
    add_metadata(writer, arch, {"vocab_size": n_vocab, **metadata})
    for prefix, tensor in tensors:
        values, kind = random_values(tensor, rng), types.get(tensor.role, kind_of.F32)
        add(writer, prefix + tensor.name, values, kind)
        if twice and tensor.role == "expert":
            add(writer, f"hobbit.low.{prefix}{tensor.name}", values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny(
    path: Path,
    shape: str,
    *,
    expert_type: str = "F16",
    n_layer: int = 4,
    n_expert: int = 8,
    n_expert_used: int = 2,
    n_embd: int = 256,
    n_ff_exp: int = 256,
    n_unused: int = 0,
    seed: int = 0,
) -> None:
    """Write a random expert model of a few MB that llama.cpp loads.

    Args:
        path: GGUF file to write
        shape: a key of ``SHAPES``
        expert_type: ggml type of the expert stacks, one that gguf can write
        n_layer: layers, counting leading dense ones
        n_expert: experts per layer
        n_expert_used: experts per token
        n_embd: model width; a multiple of 256 lets K-quants fit
        n_ff_exp: neurons of an expert; likewise
        n_unused: tokens of the vocabulary beside those that texts have
        seed: the same seed gives the same file
    """
    family = SHAPES[shape](Sizes(n_layer, n_expert, n_expert_used, n_embd, n_ff_exp))
    metadata: Metadata = {
        "block_count": n_layer,
        "context_length": CONTEXT,
        "embedding_length": n_embd,
        "attention.head_count": N_HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "expert_count": n_expert,
        "expert_used_count": n_expert_used,
        **family.metadata,
    }
    n_vocab = len(vocabulary(n_unused)[0])
    # Embeddings have size one per element, unlike the other matrices.
    tensors = [("", Tensor("token_embd.weight", (n_vocab, n_embd), scale=n_embd**0.5))]
    tensors += [(f"blk.{i}.", part) for i in range(n_layer) for part in family.layer(i)]
    tensors += [("", Tensor("output_norm.weight", (n_embd,), "norm")), ("", Tensor("output.weight", (n_vocab, n_embd)))]
    _write(path, shape, family.arch, metadata, tensors, expert_type, "F16", seed, n_unused=n_unused)


def _role(name: str, shape: Tuple[int, ...]) -> Tensor:
    role = next((role for pattern, role in _ROLES if re.fullmatch(pattern, name)), "plain")
    scale = shape[-1] ** 0.5 if name == "token_embd.weight" else 1.0
    return Tensor(name, shape, role, scale)


def _tensors(row: Architecture, metadata: Path) -> List[Tuple[str, Tensor]]:
    """The tensors of an architecture's model, without those that the row leaves out."""
    out: List[Tuple[str, Tensor]] = []
    seen = set()
    for full, shape in tensors_of(metadata):
        match = re.fullmatch(r"(blk\.\d+\.|)(.*)", full)
        assert match is not None
        prefix, name = match[1], match[2]
        if full in seen:
            continue  # the same for several layers
        seen.add(full)
        optional = re.fullmatch(OPTIONAL, name) and not re.fullmatch(row.keep, name)
        if optional or re.fullmatch(row.without, name) or (row.fused and name == "ffn_gate_exps.weight"):
            continue
        if row.fused and name == "ffn_up_exps.weight":
            name, shape = "ffn_gate_up_exps.weight", (shape[0], 2 * shape[1], shape[2])
        out.append((prefix, _role(name, shape)))
    return out


def write_architecture(path: Path, name: str, *, expert_type: str = "F16", seed: int = 0, twice: bool = False) -> None:
    """Write the tiny model of a row of ``ARCHITECTURES``.

    Args:
        twice: each expert has a low-precision copy of the same type, which is no lower.
    """
    row = ARCHITECTURES[name]
    arch = row.arch or name
    merged = {**common(), **row.metadata}
    metadata: Metadata = {key: value for key, value in merged.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        _write(header, name, arch, metadata, [], expert_type, "F32", seed)
        tensors = _tensors(row, header)
    _write(path, name, arch, metadata, tensors, expert_type, "F32", seed, twice)
