"""Two checkpoints of one model become one file: `hobbit convert HIGH --low-from LOW`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tiny_models
from gguf_files import TYPES, Quant, assert_refused, make_model, run_cli, tensors_of
from hobbit_cpp import OffloadParams
from hobbit_cpp._session import Session
from hobbit_cpp.convert import convert, pairing
from hobbit_cpp.convert.plan import LOW_PREFIX, Tensor
from models import tiny, tiny_dual


def low_of(path: Path, out: Path, kind: str) -> Path:
    """A checkpoint in a smaller precision, as another program would have made it."""
    return convert(path, out, high=kind, low=None).path


@pytest.fixture(scope="module")
def high(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("high") / "model-q8_0.gguf", Quant.Q8_0)


def test_the_copies_are_the_other_file_byte_for_byte(high: Path, tmp_path: Path) -> None:
    low = low_of(high, tmp_path / "low.gguf", "Q4_K")  # IQ4_NL where rows are short: a mixture
    report = convert(high, tmp_path / "out.gguf", low_from=low)
    assert (report.high_type, report.low_type) == ("Q8_0", "mixed")
    ours, theirs, made = tensors_of(high), tensors_of(low), tensors_of(tmp_path / "out.gguf")
    experts = [n for n in ours if n.endswith("_exps.weight")]
    assert set(made) == {*ours, *(LOW_PREFIX + n for n in experts)}
    for name, tensor in ours.items():
        assert made[name].data.tobytes() == tensor.data.tobytes()
    for name in experts:
        assert made[LOW_PREFIX + name].tensor_type == theirs[name].tensor_type
        assert made[LOW_PREFIX + name].data.tobytes() == theirs[name].data.tobytes()
    assert report.bytes_low == sum(theirs[n].n_bytes for n in experts)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["hobbit.low_source"].contents() == "low.gguf"


def test_split_checkpoints_and_a_sidecar(tmp_path: Path) -> None:
    path = tiny("qwen3moe", "Q8_0")
    high = convert(path, tmp_path / "h.gguf", low=None, split_max_bytes=1 << 20).paths
    low = convert(path, tmp_path / "l.gguf", high="Q4_0", low=None, split_max_bytes=500_000).paths
    assert len(high) > 2 and len(low) > 2
    one = convert(high[0], tmp_path / "one.gguf", low_from=low[0]).path
    assert Session(str(one), OffloadParams()).info.has_low
    side = convert(high[0], sidecar=True, low_from=low[1]).path
    assert side == tmp_path / "h.low.gguf"
    assert Session(str(high[0]), OffloadParams()).info.has_low
    a, b = tensors_of(one), tensors_of(side)
    assert {n: t.data.tobytes() for n, t in a.items() if n.startswith(LOW_PREFIX)} == {n: t.data.tobytes() for n, t in b.items()}


def test_the_high_precision_may_be_made_from_a_larger_file(tmp_path: Path) -> None:
    path = make_model(tmp_path / "high.gguf", n_layer=1, ff=256)  # F16
    low = low_of(path, tmp_path / "low.gguf", "Q2_K")
    report = convert(path, tmp_path / "out.gguf", high="Q8_0", low_from=low)
    assert (report.high_type, report.low_type) == ("Q8_0", "Q2_K")


def test_a_checkpoint_that_was_converted_lends_its_experts(tmp_path: Path) -> None:
    low = convert(tiny("mixtral"), tmp_path / "low.gguf", high="Q5_0", low="Q4_0").path
    report = convert(tiny_dual("mixtral"), tmp_path / "out.gguf", low_from=low)
    assert report.low_type == "Q5_0" and "dropped for those of the other file" in report.fallbacks[0]


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "IQ4_NL", "Q3_K", "IQ3_XXS", "Q2_K"])
def test_every_kind_of_quantisation_correlates_enough(kind: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "high.gguf", Quant.Q8_0, n_layer=1, ff=256)
    assert convert(path, tmp_path / "out.gguf", low_from=low_of(path, tmp_path / "low.gguf", kind)).low_type == kind


# ---- refused ---------------------------------------------------------------------------------------------


def test_other_weights_are_refused_with_tensor_and_correlation(tmp_path: Path) -> None:
    tiny_models.write_tiny(tmp_path / "other.gguf", "qwen3moe", expert_type="Q4_0", seed=5)
    message = (
        r"blk.0.ffn_\w+_exps.weight: expert 0 of the two files has different weights \(correlation -?0.0\d\d of Q8_0 with Q4_0"
    )
    assert_refused(tiny("qwen3moe", "Q8_0"), tmp_path / "out.gguf", message, low_from=tmp_path / "other.gguf")


@pytest.mark.parametrize("damage", ["swap", "scale", "zero"])
def test_one_expert_that_differs_is_found(high: Path, tmp_path: Path, damage: str) -> None:
    """The last layer, one projection: experts in another order, or spoilt."""
    low = low_of(high, tmp_path / "low.gguf", "Q4_0")
    name = "blk.1.ffn_up_exps.weight"
    data = bytearray(low.read_bytes())
    tensor = tensors_of(low)[name]
    size, at = tensor.n_bytes // 4, tensor.data_offset
    slices = [bytes(data[at + i * size : at + (i + 1) * size]) for i in range(4)]
    if damage == "swap":
        slices[0], slices[3] = slices[3], slices[0]
    elif damage == "zero":
        slices[3] = bytes(size)
    else:
        blocks = np.frombuffer(slices[3], np.uint8).reshape(-1, 18).copy()
        blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(4)).view(np.uint8)
        slices[3] = blocks.tobytes()
    data[at : at + 4 * size] = b"".join(slices)
    low.write_bytes(data)
    assert_refused(high, tmp_path / "out.gguf", rf"{name}: expert \d of the two files", low_from=low)


def test_files_swapped_or_as_large_are_refused(high: Path, tmp_path: Path) -> None:
    low = low_of(high, tmp_path / "low.gguf", "Q4_0")
    assert_refused(low, tmp_path / "out.gguf", "not smaller .*were the two files swapped", low_from=high)
    assert_refused(high, tmp_path / "out.gguf", "not smaller", low_from=high)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 3}, "its block_count is 3, not 2"),
        ({"arch": "olmoe"}, "its architecture is olmoe, not qwen3moe"),
        ({"n_expert": 8}, "its expert_count is 8, not 4"),
        ({"tokens": ["a", "b", "", "c", "d"]}, "token 1 of its vocabulary is 'b', not 'ß'"),
        ({"tokens": ["a"]}, "its vocabulary has 1 tokens, not 5"),
        ({"moe": False}, "has no blk.0.ffn_up_exps.weight"),
        ({"ff": 64}, r"has the shape \[256, 96, 4\], in the file for the low precision \[256, 64, 4\]"),
    ],
)
def test_what_is_not_the_same_model_is_refused(high: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    low = make_model(tmp_path / "low.gguf", Quant.Q4_0, **options)
    assert_refused(high, tmp_path / "out.gguf", message, low_from=low)


def test_options_that_exclude_each_other(high: Path, tmp_path: Path) -> None:
    assert_refused(high, tmp_path / "out.gguf", "give one of them", low_from=high, low="Q5_0")
    done = run_cli("convert", str(high), "-o", str(tmp_path / "out.gguf"), "--low", "Q4_0", "--low-from", str(high))
    assert done.returncode == 2 and "not allowed with" in done.stderr
    low = low_of(high, tmp_path / "low.gguf", "Q4_0")
    assert_refused(high, low, "is the input itself", low_from=low, force=True)
    assert_refused(high, tmp_path / "out.gguf", "cannot read .*No such file", low_from=tmp_path / "missing.gguf")


def test_how_alike_two_must_be_is_said_by_the_one_of_fewer_bits() -> None:
    def of(kind: str) -> Tensor:
        return Tensor("blk.0.ffn_up_exps.weight", (512, 2, 4), TYPES.by_name[kind])

    assert pairing.correlation_limit(of("Q8_0"), of("IQ2_XXS")) == 0.7
    assert pairing.correlation_limit(of("Q8_0"), of("Q4_0")) == 0.9


def test_the_last_of_many_experts_is_looked_at(tmp_path: Path) -> None:
    high = make_model(tmp_path / "high.gguf", Quant.Q8_0, n_expert=8)
    low = convert(high, tmp_path / "low.gguf", high="Q4_0", low=None).path
    tensor = tensors_of(low)["blk.1.ffn_up_exps.weight"]
    data = bytearray(low.read_bytes())
    size, at = tensor.n_bytes // 8, tensor.data_offset
    data[at + 7 * size : at + 8 * size] = bytes(size)
    low.write_bytes(data)
    assert_refused(high, tmp_path / "out.gguf", "blk.1.ffn_up_exps.weight: expert 7 of the two files", low_from=low)


def test_experts_a_token_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    high = make_model(tmp_path / "high.gguf", Quant.Q8_0)
    add = gguf.GGUFWriter.add_expert_used_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_expert_used_count", lambda self, n: add(self, n + 1))
    low = make_model(tmp_path / "low.gguf", Quant.Q4_0)
    assert_refused(high, tmp_path / "out.gguf", "its expert_used_count is 3, not 2", low_from=low)
