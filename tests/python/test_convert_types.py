"""ggml's quantisers behind the C API."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from gguf_files import KINDS
from hobbit_cpp.convert import ConvertError
from hobbit_cpp.convert.ggtypes import load_types

# ---- ggml's quantisers behind the C API -------------------------------------------------------------------


def test_the_type_table_is_ggmls() -> None:
    types = load_types()
    for name, (number, block, size) in KINDS.items():
        info = types.by_name[name]
        assert (info.id, info.block, info.block_bytes) == (number, block, size)
        assert info.needs_imatrix == (name == "IQ2_XXS")
        assert info.computable == (name != "Q8_K")
    assert 4 not in types.by_id  # removed from ggml


def test_every_target_can_be_made() -> None:
    from hobbit_cpp.convert.quantise import Quantiser
    from hobbit_cpp.convert.verify import error_limit

    quantiser = Quantiser()
    x = np.random.default_rng(1).standard_normal(512, dtype=np.float32) * 0.03
    for kind in load_types().targets():
        if kind.name in ("IQ2_S", "IQ1_M"):  # ggml needs 10 and 20 s for their tables
            continue
        out = np.empty(kind.row_bytes(512), np.uint8)
        quantiser.quantise(kind, x, out, 512, "x")
        back = np.empty_like(x)
        quantiser.to_float(kind, out, back, "x")
        assert np.linalg.norm(back - x) <= error_limit(kind) * np.linalg.norm(x), kind.name
        quantiser.quantise(kind, np.zeros_like(x), out, 512, "x")  # an expert that was never trained
        quantiser.to_float(kind, out, back, "x")
        assert np.linalg.norm(back) == 0, kind.name


def test_what_ggml_would_abort_on_is_an_error() -> None:
    from hobbit_cpp.convert.quantise import Quantiser

    types, quantiser = load_types(), Quantiser()
    x = np.zeros(512, np.float32)
    out = np.empty(4096, np.uint8)

    def refused(message: str, name: str, values: npt.NDArray[np.float32], row: int) -> None:
        with pytest.raises(ConvertError, match=message):
            quantiser.quantise(types.by_name[name], values, out, row, "x")

    refused("not a multiple of the 256", "Q4_K", x[:96], 96)
    refused("importance matrix", "IQ2_XXS", x, 256)
    refused("no quantiser", "Q8_K", x, 256)
    refused("no quantiser", "I32", x, 256)
    for bad in (np.nan, np.inf, 1e6):
        y = x.copy()
        y[300] = bad
        refused("row 1, column 44", "Q3_K", y, 256)
    with pytest.raises(ConvertError, match="not a multiple"):
        quantiser.to_float(types.by_name["Q8_0"], out, x[:33], "x")
    with pytest.raises(ConvertError, match="cannot turn"):
        quantiser.to_float(types.by_name["I8"], out, x, "x")
