#!/usr/bin/env python3
"""Small GGUFs for the fuzz targets to start from: make_corpus.py [FOLDER]     (default: corpus/ beside this file)

Written by gguf-py, apart from our own readers and writers. What the fuzzer found lies beside them as found-*.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import gguf
import numpy as np

Shapes = Dict[str, Tuple[Any, ...]]
Q4_0, F16, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


def experts(n_layer: int, n_expert: int, kind: Any, prefix: str = "", fused: bool = False) -> Shapes:
    """Shapes as ggml has them: [n_in, n_out, n_expert]."""
    out: Shapes = {}
    for i in range(1, n_layer + 1):
        names = ("gate_up", "down") if fused else ("up", "gate", "down")
        for name in names:
                # as tests/cpp/tiny-gguf.h has them, for a sidecar that fits
            ne = (32, 32, n_expert) if name == "down" else (32, 4, n_expert)
            out[f"{prefix}blk.{i}.ffn_{name}_exps.weight"] = (*ne, kind)
    return out


def write(path: Path, tensors: Shapes, arch: str = "tiny", **metadata: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif name.startswith("split."):
            writer.add_uint16(name, value)
        else:
            writer.add_uint32(name, value)
    for name, (*ne, kind) in tensors.items():
        shape = tuple(reversed(ne))
        data: Any = np.zeros(shape, np.float32 if kind == F32 else np.float16)
        if kind == Q4_0:
            writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // 32 * 18), np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpus"
    model, low = folder / "gguf", folder / "sidecar"
    facts: Dict[str, Any] = {"tiny__block_count": 3, "tiny__expert_used_count": 2}
    dense: Shapes = {"token_embd.weight": (32, 4, F32), "blk.0.ffn_up.weight": (32, 4, F16)}
    high, copies = experts(2, 4, F16), experts(2, 4, Q4_0, "hobbit.low.")
    write(model / "experts.gguf", {**dense, **high}, **facts)
    write(model / "both.gguf", {**dense, **high, **copies}, **facts)
    write(model / "fused.gguf", experts(1, 4, Q4_0, fused=True), **facts)
    write(model / "dense.gguf", dense, tiny__block_count=1)
    write(model / "groups.gguf", high, **facts, tiny__expert_group_count=2, tiny__expert_group_used_count=1)
    write(model / "array.gguf", high, tiny__block_count=3, tiny__expert_used_count=[0, 2, 2])
    write(model / "split.gguf", high, **facts, split__no=0, split__count=2)
    bound: Dict[str, Any] = {"hobbit__sidecar__fingerprint": "sha256:" + 64 * "0", "hobbit__source": "model.gguf"}
    write(low / "copies.gguf", copies, "hobbit-sidecar", **bound)
    write(low / "some.gguf", dict(list(copies.items())[:2]), "hobbit-sidecar", **bound)
    write(low / "more.gguf", {**copies, **dense}, "hobbit-sidecar", **bound)
    write(low / "unbound.gguf", copies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
