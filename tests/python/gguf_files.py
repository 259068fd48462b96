"""Small GGUFs to convert, and words for looking at what became of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from hobbit_cpp.convert import ConvertError, convert
from hobbit_cpp.convert.ggtypes import TypeInfo, TypeTable

# name: number, elements and bytes of a block, as ggml-common.h has them
KINDS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_K": (15, 256, 292), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66),
    "IQ4_NL": (20, 32, 18), "BF16": (30, 1, 2), "MXFP4": (39, 32, 17), "Q2_0": (42, 64, 18),
}  # fmt: skip
TYPES = TypeTable(
    TypeInfo(number, name, block, size, needs_imatrix=name == "IQ2_XXS", computable=name != "Q8_K")
    for name, (number, block, size) in KINDS.items()
)

N_EXPERT, D, FF, N_LAYER = 4, 256, 96, 2
TOKENS = ("a", "ß", "", "\u6f22", "line\nbreak")
Quant = gguf.GGMLQuantizationType


def _add(w: gguf.GGUFWriter, name: str, x: npt.NDArray[np.float32], kind: Any) -> None:
    if kind in (Quant.F32, Quant.F16):
        w.add_tensor(name, x.astype(np.float32 if kind == Quant.F32 else np.float16))
    else:
        w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)


def make_model(
    path: Path,
    kind: Any = Quant.F16,
    *,
    moe: bool = True,
    nan: bool = False,
    n_layer: int = N_LAYER,
    name: str = "täst",
    arch: str = "qwen3moe",
    n_expert: int = N_EXPERT,
    ff: int = FF,
    tokens: Sequence[str] = TOKENS,
    seed: int = 7,
    **options: Any,
) -> Path:
    """A MoE GGUF with all kinds of metadata; options: GGUFWriter's, for split files."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) * 0.05

    w = gguf.GGUFWriter(path, arch, **options)
    w.add_name(name)
    w.add_block_count(n_layer)
    w.add_expert_count(n_expert)
    w.add_expert_used_count(2)
    w.add_bool("x.flag", True)
    w.add_float64("x.double", 0.1)
    w.add_uint64("x.big", 1 << 40)
    w.add_int8("x.small", -3)
    w.add_array("x.numbers", [1, 2, 3])
    w.add_array("x.floats", [0.5, -1.25])
    w.add_token_list(list(tokens))
    w.add_token_scores([float(i) for i in range(len(tokens))])
    _add(w, "token_embd.weight", weights(5, D), Quant.Q8_0)
    _add(w, "output_norm.weight", weights(D), Quant.F32)
    for i in range(n_layer):
        _add(w, f"blk.{i}.ffn_gate_inp.weight", weights(n_expert, D), Quant.F32)
        if moe:
            x = weights(n_expert, ff, D)
            if nan:
                x[1, 2, 3] = np.nan
            _add(w, f"blk.{i}.ffn_gate_exps.weight", x, kind)
            _add(w, f"blk.{i}.ffn_down_exps.weight", weights(n_expert, D, ff), kind)
            _add(w, f"blk.{i}.ffn_up_exps.weight", weights(n_expert, ff, D), kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def floats_of(tensor: gguf.ReaderTensor) -> npt.NDArray[np.float32]:
    floats: npt.NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return floats


def is_routed(name: str) -> bool:
    return name.endswith("_exps.weight")


def assert_refused(src: Path, dst: Path, message: str, **options: Any) -> None:
    before = sorted(dst.parent.iterdir()) if dst.parent.is_dir() else []
    with pytest.raises(ConvertError, match=message) as e:
        convert(src, dst, **options)
    assert "\n" not in str(e.value)
    assert (sorted(dst.parent.iterdir()) if dst.parent.is_dir() else []) == before, "a file was left"


def run_cli(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hobbit_cpp", *args], capture_output=True, text=True, timeout=120, **options)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
