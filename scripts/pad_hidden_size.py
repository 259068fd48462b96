#!/usr/bin/env python3
"""Copy a GGUF of the llama architecture with a larger hidden size: channels that are always zero are added.

    scripts/pad_hidden_size.py demo.gguf demo-768.gguf --to 768

The model computes the same. What it is for: rows of 576 weights, as SmolLM2 has them, cannot be stored in the types of llama.cpp
with blocks of 256 (Q2_K, IQ3_XXS, ...); rows of 768 can.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np
import numpy.typing as npt

# Which axis of a tensor (in numpy's order) is the hidden size; the others go by their last one.
_OUTPUTS = {"attn_output.weight": 0, "ffn_down.weight": 0, "ffn_down_exps.weight": 1}


def padded(tensor: gguf.ReaderTensor, n_embd: int, to: int) -> npt.NDArray[Any]:
    """The data of a tensor with zeros for the new channels, in its own type."""
    data: npt.NDArray[Any] = np.asarray(tensor.data)
    kind = tensor.tensor_type
    name = tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name
    axis = _OUTPUTS.get(name, data.ndim - 1)
    if name.endswith("norm.weight"):
        # RMSNorm divides by the mean over more channels now
        data = data * np.float32(math.sqrt(n_embd / to))
    have, want = n_embd, to
    if axis == data.ndim - 1:  # along a row, whose elements are blocks in most types: a block of zero bytes is one of zeros
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if n_embd % block or to % block:
            raise ValueError(f"{tensor.name}: blocks of {kind.name} ({block}) do not divide {n_embd} and {to}")
        have, want = (n // block * size // data.itemsize for n in (n_embd, to))
    if data.shape[axis] != have:
        raise ValueError(f"{tensor.name}: {data.shape[axis]} where the hidden size should be {have}: not a plain llama model")
    return np.pad(data, [(0, want - have if i == axis else 0) for i in range(data.ndim)])


def pad_hidden_size(source: Path, target: Path, to: int) -> None:
    """Writes `target` beside and renames it.

    Raises:
        ValueError: not a model of the llama architecture, or a size that is not larger, or does not fit the types.
    """
    reader = gguf.GGUFReader(source)
    fields = reader.fields
    if fields["general.architecture"].contents() != "llama":
        raise ValueError(f"{source}: only models of the llama architecture can be padded")
    n_embd, n_head = (int(fields[f"llama.{key}"].contents()) for key in ("embedding_length", "attention.head_count"))
    if to <= n_embd:
        raise ValueError(f"the hidden size is {n_embd} already")
    key = "llama.attention.key_length"
    head = int(fields[key].contents()) if key in fields else n_embd // n_head
    eps = "llama.attention.layer_norm_rms_epsilon"
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    new = {
        "llama.embedding_length": to,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.rope.dimension_count": head,
        # the mean of squares that it is added to is smaller by as much
        eps: float(fields[eps].contents()) * n_embd / to,
    }
    try:
        for field in fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture", *new)):
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        for name, value in new.items():
            kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind)
        for tensor in reader.tensors:
            grown = padded(tensor, n_embd, to)
            writer.add_tensor_info(tensor.name, grown.shape, grown.dtype, grown.nbytes, tensor.tensor_type)
            del grown
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:  # made twice, so that one is in memory at a time
            writer.write_tensor_data(padded(tensor, n_embd, to))
        writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Optional[list[str]] = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--to", metavar="N", type=int, default=768, help="the new hidden size; default: 768")
    args = parser.parse_args(arguments)
    try:
        pad_hidden_size(args.source, args.target, args.to)
    except (OSError, ValueError, KeyError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
