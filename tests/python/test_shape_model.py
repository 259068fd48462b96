"""Files with the shapes of well-known models: they load, offloaded and not, and their low copies are copies."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import make_shape_model
from decode import load, logits, words
from hobbit_cpp import Llama
from hobbit_cpp.convert.ggtypes import load_types
from hobbit_cpp.convert.quantise import Quantiser
from hobbit_cpp.convert.source import Source
from shape_model import SHAPES, make, write


def shrunk(name: str) -> Any:
    """The shape with few and small experts and a small vocabulary."""
    shape = SHAPES[name]
    n_ff = 256
    more = {key: n_ff if key.endswith("feed_forward_length") else value for key, value in shape.more.items()}
    shared = n_ff * int(shape.more.get("expert_shared_count", 1)) if shape.n_ff_shared else 0
    if "expert_shared_feed_forward_length" in more:
        more["expert_shared_feed_forward_length"] = shared
    return dataclasses.replace(
        shape, n_ff_exp=n_ff, n_ff_dense=n_ff if shape.n_ff_dense else 0, n_ff_shared=shared, n_vocab=600,
        n_expert=shape.n_expert_used + 2, more=more,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SHAPES", {name: shrunk(name) for name in SHAPES})


@pytest.mark.parametrize("name", SHAPES)
def test_runs_offloaded_as_in_memory(name: str, small: None, tmp_path: Path) -> None:
    path = tmp_path / "shape.gguf"
    layers = SHAPES[name].dense_layers + 1
    report = make(name, path, layers=layers, progress=False)
    assert report.bytes_file == path.stat().st_size and not list(tmp_path.glob("*partial*"))
    llm = load(Llama, str(path), 2)
    plain = logits(llm, tokens := words(llm, 8), 8)
    llm.close()
    assert np.isfinite(plain).all() and 0.1 < plain.std() < 10
    llm = load(Llama, str(path), 2, offload="lru", expert_cache="100%")
    assert np.array_equal(logits(llm, tokens, 8), plain)
    assert llm.offload_info.n_moe_layer == 1 and llm.offload_info.n_expert_used == SHAPES[name].n_expert_used
    llm.close()


def test_a_low_copy_is_the_copy_of_its_expert(small: None, tmp_path: Path) -> None:
    path = tmp_path / "dual.gguf"
    make("olmoe", path, layers=1, high="Q8_0", low="Q4_0", progress=False)
    types = load_types()
    quantiser = Quantiser()
    with Source(path, types) as source:
        tensors = {t.name: t for t in source.tensors}
        values = []
        for name in ("blk.0.ffn_up_exps.weight", "hobbit.low.blk.0.ffn_up_exps.weight"):
            t = tensors[name]
            assert t.offset % 4096 == 0
            data, floats = np.empty(t.n_bytes, np.uint8), np.empty(t.n_rows * t.row, np.float32)
            source.read(0, t.offset, data.data)
            quantiser.to_float(t.type, data, floats, name)
            values.append(floats)
    high, low = values
    assert abs(high.mean()) < 0.01 * high.std()  # nibbles of Q4_0 drawn alike from 0..15 would have a mean of -0.5
    assert abs(low.mean()) < 0.02 * low.std()
    assert np.linalg.norm(high - low) < 0.15 * np.linalg.norm(high)
    experts = high.reshape(10, -1)
    assert all(not np.array_equal(experts[0], other) for other in experts[1:])
    llm = load(Llama, str(path), 2, offload="hobbit", expert_cache="90%")
    assert np.isfinite(logits(llm, words(llm, 8), 1)).all()
    llm.close()


@pytest.mark.parametrize("high, low", [("Q4_K", "Q2_K"), ("Q6_K", "Q3_K"), ("Q8_0", "IQ4_NL"), ("MXFP4", None)])
def test_any_pair_of_types(high: str, low: Optional[str], small: None, tmp_path: Path) -> None:
    path = tmp_path / "pair.gguf"
    report = make("qwen3-30b-a3b", path, layers=1, high=high, low=low, progress=False)
    assert (report.high_type, report.low_type) == (high, low or "none")
    llm = load(Llama, str(path), 2, offload="hobbit", expert_cache="90%")
    assert np.isfinite(logits(llm, words(llm, 4), 1)).all()
    llm.close()


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"mine")
    for arguments, says in (
        ([], "exists: use --force"),
        (["--force", "--layers", "0"], "give 1 to 16"),
        (["--force", "--high", "Q9"], "unknown type"),
        (["--force", "--high", "Q4_0", "--low", "Q8_0"], "is not smaller"),
    ):
        with pytest.raises(SystemExit):
            make_shape_model.main(["--like", "olmoe", "--out", str(out), *arguments])
        assert says in capsys.readouterr().err
    assert out.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
