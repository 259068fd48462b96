"""hobbit_cpp.convert: what becomes what, what is written, and every way it can fail."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import gguf
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from hobbit_cpp.convert import ConvertError, convert, job, writer
from hobbit_cpp.convert.ggtypes import TypeInfo, TypeTable, load_types
from hobbit_cpp.convert.header import TensorInfo, pad, read_header, string_value, u32_value, write_header
from hobbit_cpp.convert.plan import ALIGNMENT, LOW_PREFIX, MAX_NAME, Plan, Tensor, is_expert, make_plan

# ---- planning: pure --------------------------------------------------------------------------------------

# name: number, elements and bytes of a block, as ggml-common.h has them
_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_K": (15, 256, 292), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66),
    "IQ4_NL": (20, 32, 18), "BF16": (30, 1, 2), "MXFP4": (39, 32, 17), "Q2_0": (42, 64, 18),
}  # fmt: skip
TYPES = TypeTable(
    TypeInfo(number, name, block, size, needs_imatrix=name == "IQ2_XXS", computable=name != "Q8_K")
    for name, (number, block, size) in _TYPES.items()
)


def experts(name: str, row: int, kind: str = "F16", n_expert: int = 4, n_rows: int = 2) -> Tensor:
    return Tensor(name, (row, n_rows, n_expert), TYPES.by_name[kind])


def up(row: int, kind: str = "F16") -> Tensor:
    return experts("blk.0.ffn_up_exps.weight", row, kind)


def types_of(plan: Plan) -> dict[str, str]:
    return {o.name: o.type.name for o in plan.outputs}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_up_exps.weight", (64, 32, 8), True),
        ("blk.11.ffn_gate_up_exps.weight", (64, 32, 8), True),
        ("blk.3.ffn_down_chexps.weight", (64, 32, 8), True),
        ("blk.0.ffn_up_exps.weight", (64, 32, 1), False),  # one expert is a dense layer
        ("blk.0.ffn_up_exps.weight", (64, 32), False),
        ("blk.0.ffn_up_shexp.weight", (64, 32, 8), False),  # always used
        ("blk.0.ffn_up_exps.bias", (64, 8), False),
        ("blk.0.ffn_gate_inp.weight", (64, 8), False),
        ("hobbit.low.blk.0.ffn_up_exps.weight.x", (64, 32, 8), False),
    ],
)
def test_routed_experts_are_told_by_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_expert(name, shape) is expected


@pytest.mark.parametrize(
    ("wanted", "row", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q4_0"),  # 4.5 bits both; IQ4_NL as well, but that takes ggml a hundred times as long
        ("Q6_K", 576, "Q5_1"),  # 6.5625 bits: 6 is nearer than 8.5
        ("Q5_K", 576, "Q5_0"),
        ("Q2_K", 576, "Q4_0"),  # not Q2_0, although that is nearer: it is for ternary models
        ("Q4_0", 33, "F16"),
        ("Q8_0", 100, "F16"),
        ("Q2_0", 96, "Q4_0"),
        ("Q2_0", 64, "Q2_0"),
        ("F32", 7, "F32"),
    ],
)
def test_a_type_that_does_not_fit_falls_back_to_the_nearest(wanted: str, row: int, expected: str) -> None:
    fitted = TYPES.fit(TYPES.by_name[wanted], row)
    assert fitted is not None and fitted.name == expected


def test_each_kind_of_fallback_is_noted_once() -> None:
    tensors = [experts(f"blk.{i}.ffn_{p}_exps.weight", 576) for i in range(3) for p in ("up", "down")]
    tensors.append(experts("blk.3.ffn_up_exps.weight", 544))
    plan = make_plan(tensors, TYPES, "Q8_0", "Q4_K")
    assert len(plan.notes) == 2
    assert "rows of 576" in plan.notes[0] and "Q4_0 instead" in plan.notes[0]
    assert "rows of 544" in plan.notes[1]


def test_order_is_dense_then_each_layer_high_before_low() -> None:
    names = ["blk.10.ffn_down_exps.weight", "blk.2.ffn_gate_exps.weight", "blk.2.ffn_down_exps.weight"]
    names += ["blk.10.ffn_up_exps.weight", "blk.2.ffn_up_exps.weight", "blk.10.ffn_gate_exps.weight"]
    tensors = [experts(n, 32) for n in names[:3]] + [Tensor("output.weight", (32, 5), TYPES.by_name["F32"])]
    tensors += [experts(n, 32) for n in names[3:]] + [Tensor("norm.weight", (32,), TYPES.by_name["F32"])]
    plan = make_plan(tensors, TYPES, "Q8_0", "Q4_0")
    layers = [[f"blk.{i}.ffn_{p}_exps.weight" for p in ("up", "gate", "down")] for i in (2, 10)]
    expected = ["output.weight", "norm.weight"]
    for layer in layers:
        expected += layer + [LOW_PREFIX + n for n in layer]
    assert [o.name for o in plan.outputs] == expected
    assert plan.n_layers == 2 and plan.n_experts == 4


def test_keep_takes_the_source_types_and_tells_a_mixture() -> None:
    tensors = [experts("blk.0.ffn_up_exps.weight", 256, "Q4_K"), experts("blk.0.ffn_down_exps.weight", 256, "Q6_K")]
    plan = make_plan(tensors, TYPES, "keep", "Q2_K")
    assert list(types_of(plan).values()) == ["Q4_K", "Q6_K", "Q2_K", "Q2_K"]
    assert (plan.high_type, plan.low_type) == ("mixed", "Q2_K")


def test_without_low_precision_there_are_no_copies() -> None:
    for low in (None, "none", "NONE"):
        plan = make_plan([up(32)], TYPES, "q8_0", low)
        assert types_of(plan) == {"blk.0.ffn_up_exps.weight": "Q8_0"}
        assert plan.low_type == "none"


def test_types_are_found_in_any_case() -> None:
    assert make_plan([up(256)], TYPES, "q6_k", "q4_K").high_type == "Q6_K"


@pytest.mark.parametrize(
    ("high", "low", "source", "message"),
    [
        ("Q4_0", "Q4_0", "F16", "not smaller"),
        ("Q4_0", "Q8_0", "F16", "not smaller"),
        ("keep", "Q4_0", "Q4_0", "not smaller"),
        ("Q5_0", "Q9_9", "F16", "unknown type 'Q9_9': use one of"),
        ("Q8_0", "IQ2_XXS", "F16", "importance matrix"),
        ("Q8_K", "Q4_0", "F16", "cannot be stored as Q8_K"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(high: str, low: str, source: str, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        make_plan([up(256, source)], TYPES, high, low)


def test_a_fallback_can_make_low_as_large_as_high() -> None:
    with pytest.raises(ConvertError, match="not smaller"):
        make_plan([up(576)], TYPES, "Q4_0", "Q2_K")


def test_the_refusal_of_an_imatrix_type_names_types_that_do_without() -> None:
    with pytest.raises(ConvertError) as e:
        make_plan([up(256)], TYPES, "Q8_0", "IQ2_XXS")
    assert "Q2_K" in str(e.value) and "IQ2_XXS," not in str(e.value)


def test_making_a_type_larger_is_noted() -> None:
    assert "--high keep is better" in make_plan([up(64, "Q4_0")], TYPES, "Q8_0", "Q2_0").notes[0]


def test_dense_and_old_models_are_refused() -> None:
    dense = Tensor("blk.0.ffn_up.weight", (64, 64), TYPES.by_name["F16"])
    with pytest.raises(ConvertError, match="dense model"):
        make_plan([dense], TYPES, "keep", "Q4_0")
    old = Tensor("blk.0.ffn_up.3.weight", (64, 64), TYPES.by_name["F16"])
    with pytest.raises(ConvertError, match="one tensor per expert"):
        make_plan([dense, old], TYPES, "keep", "Q4_0")


def test_a_name_too_long_for_a_copy_is_refused() -> None:
    name = "x" * (MAX_NAME - len(LOW_PREFIX) - len("_exps.weight"))
    assert make_plan([experts(name + "_exps.weight", 32)], TYPES, "keep", "Q4_0").n_layers == 1
    with pytest.raises(ConvertError, match="too long"):
        make_plan([experts(name + "x_exps.weight", 32)], TYPES, "keep", "Q4_0")


def test_a_converted_file_gets_new_copies_from_its_high_precision_experts() -> None:
    tensors = [up(32, "Q8_0"), experts(LOW_PREFIX + "blk.0.ffn_up_exps.weight", 32, "Q4_0")]
    plan = make_plan(tensors, TYPES, "keep", "Q5_0")
    assert [(o.name, o.source.name, o.type.name) for o in plan.outputs] == [
        ("blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight", "Q8_0"),
        (LOW_PREFIX + "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight", "Q5_0"),
    ]
    assert "converted before" in plan.notes[0]
    with pytest.raises(ConvertError, match="--high keep"):
        make_plan(tensors, TYPES, "Q6_K", "Q4_0")


@given(
    rows=st.lists(st.sampled_from([1, 32, 48, 64, 100, 256, 576, 768]), min_size=1, max_size=6),
    high=st.sampled_from([*sorted(_TYPES), "keep"]),
    low=st.sampled_from([*sorted(_TYPES), "none"]),
    n_rows=st.integers(1, 50),
)
@settings(deadline=None)
def test_every_plan_is_sound_or_refused(rows: list[int], high: str, low: str, n_rows: int) -> None:
    tensors = [experts(f"blk.{i}.ffn_up_exps.weight", row, n_rows=n_rows) for i, row in enumerate(rows)]
    tensors.append(Tensor("output.weight", (32, 7), TYPES.by_name["Q8_0"]))
    try:
        plan = make_plan(tensors, TYPES, high, low)
    except ConvertError as e:
        assert "\n" not in str(e)
        return
    assert {o.source.name for o in plan.outputs} == {t.name for t in tensors}
    assert len({o.name for o in plan.outputs}) == len(plan.outputs)
    end = 0
    sizes: dict[tuple[str, str], int] = {}
    for o in plan.outputs:
        assert o.source.row % o.type.block == 0 and not o.type.needs_imatrix
        assert o.offset == end and o.offset % ALIGNMENT == 0
        end = o.offset + pad(o.n_bytes, ALIGNMENT)
        sizes[o.source.name, o.role] = o.n_bytes
    assert end == plan.data_bytes
    for (name, role), size in sizes.items():
        assert role != "low" or size < sizes[name, "high"]
    # every row of every source exactly once
    seen = {t.name: 0 for t in tensors}
    for chunk in writer.chunks(plan):
        assert chunk.first_row == seen[chunk.source.name]
        seen[chunk.source.name] += chunk.n_rows
    assert seen == {t.name: t.n_rows for t in tensors}


# ---- header ----------------------------------------------------------------------------------------------


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_a_clear_error_or_a_header(
    cut: int, flip: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {"general.architecture": string_value("x"), "a": u32_value(3)}
    good = write_header(values, [TensorInfo("t.weight", (32, 2), 0, 0)])
    bad = bytearray(good)
    bad[flip % len(bad)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    for data in (bytes(bad), good[: cut % len(good)]):
        path.write_bytes(data)
        with open(path, "rb") as file:
            try:
                read_header(file, "damaged.gguf", len(data))
            except ConvertError as e:
                assert "damaged.gguf" in str(e) and "\n" not in str(e)


# ---- a small model ---------------------------------------------------------------------------------------

N_EXPERT, D, FF, N_LAYER = 4, 256, 96, 2
Quant = gguf.GGMLQuantizationType


def _add(w: gguf.GGUFWriter, name: str, x: npt.NDArray[np.float32], kind: Any) -> None:
    if kind in (Quant.F32, Quant.F16):
        w.add_tensor(name, x.astype(np.float32 if kind == Quant.F32 else np.float16))
    else:
        w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)


def make_model(path: Path, kind: Any = Quant.F16, *, moe: bool = True, nan: bool = False, **options: Any) -> Path:
    """A MoE GGUF with all kinds of metadata; options: GGUFWriter's, for split files."""
    rng = np.random.default_rng(7)

    def weights(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) * 0.05

    w = gguf.GGUFWriter(path, "qwen3moe", **options)
    w.add_name("täst")
    w.add_block_count(N_LAYER)
    w.add_expert_count(N_EXPERT)
    w.add_bool("x.flag", True)
    w.add_float64("x.double", 0.1)
    w.add_uint64("x.big", 1 << 40)
    w.add_int8("x.small", -3)
    w.add_array("x.numbers", [1, 2, 3])
    w.add_array("x.floats", [0.5, -1.25])
    w.add_token_list(["a", "ß", "", "\u6f22", "line\nbreak"])
    w.add_token_scores([0.0, -1.0, 2.0, 3.0, 4.0])
    _add(w, "token_embd.weight", weights(5, D), Quant.Q8_0)
    _add(w, "output_norm.weight", weights(D), Quant.F32)
    for i in range(N_LAYER):
        _add(w, f"blk.{i}.ffn_gate_inp.weight", weights(N_EXPERT, D), Quant.F32)
        if moe:
            x = weights(N_EXPERT, FF, D)
            if nan:
                x[1, 2, 3] = np.nan
            _add(w, f"blk.{i}.ffn_gate_exps.weight", x, kind)
            _add(w, f"blk.{i}.ffn_down_exps.weight", weights(N_EXPERT, D, FF), kind)
            _add(w, f"blk.{i}.ffn_up_exps.weight", weights(N_EXPERT, FF, D), kind)
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


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.gguf")


# relative error (norms) on Gaussian weights, with a margin of a quarter
_ERROR = {"F32": 0.0, "F16": 3e-4, "BF16": 3e-3, "Q8_0": 0.007, "Q6_K": 0.025, "Q5_0": 0.055, "Q5_1": 0.05,
          "Q4_K": 0.095, "Q4_0": 0.11, "IQ4_NL": 0.1, "Q2_K": 0.4, "Q3_K": 0.2}  # fmt: skip


@pytest.mark.parametrize("source", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0])
@pytest.mark.parametrize(
    ("high", "low"),
    [("Q8_0", "Q4_0"), ("keep", "Q4_K"), ("keep", None), ("Q6_K", "Q2_K"), ("F16", "IQ4_NL"), ("BF16", "Q5_1")],
)
def test_round_trip(source: Any, high: str, low: str | None, tmp_path: Path) -> None:
    src = make_model(tmp_path / "in.gguf", source)
    report = convert(src, tmp_path / "out.gguf", high=high, low=low, threads=2)
    before, after = tensors_of(src), tensors_of(tmp_path / "out.gguf")

    for name, tensor in before.items():
        made = after[name]
        assert list(made.shape) == list(tensor.shape)
        if not is_routed(name) or high == "keep":
            assert made.tensor_type == tensor.tensor_type
            assert made.data.tobytes() == tensor.data.tobytes(), name
    copies = [LOW_PREFIX + n for n in before if is_routed(n)] if low else []
    assert set(after) == {*before, *copies}
    for name, made in after.items():
        assert made.data_offset % ALIGNMENT == 0
        original = before[name[len(LOW_PREFIX) :] if name.startswith(LOW_PREFIX) else name]
        want, have = floats_of(original), floats_of(made)
        error = np.linalg.norm(have - want) / np.linalg.norm(want)
        assert error <= _ERROR[made.tensor_type.name], (name, made.tensor_type.name)

    routed = [t for n, t in after.items() if is_routed(n) and not n.startswith(LOW_PREFIX)]
    assert report.bytes_high == sum(t.n_bytes for t in routed)
    assert report.bytes_low == sum(after[n].n_bytes for n in copies)
    assert report.bytes_dense == sum(t.n_bytes for n, t in before.items() if not is_routed(n))
    assert report.bytes_file == (tmp_path / "out.gguf").stat().st_size
    assert (report.n_layers, report.n_experts) == (N_LAYER, N_EXPERT)


def test_metadata_is_copied_byte_for_byte(f16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(f16, out, high="Q8_0", low="Q4_K")

    def raw(path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            return dict(read_header(file, str(path), path.stat().st_size).values)

    before, after = raw(f16), raw(out)
    added = {k: after.pop(k).scalar() for k in list(after) if k.startswith("hobbit.") or k == "general.alignment"}
    after.pop("general.quantization_version")
    assert after == before
    assert added.pop("hobbit.converter", "").startswith("hobbit-cpp ")
    assert added == {
        "general.alignment": ALIGNMENT,
        "hobbit.version": 1,
        "hobbit.high_type": "Q8_0",
        "hobbit.low_type": "mixed",  # Q4_K, but Q4_0 where rows are 96 long
        "hobbit.source": "model.gguf",
    }
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "ß", "", "\u6f22", "line\nbreak"]


def test_the_result_does_not_depend_on_the_number_of_threads_or_the_size_of_chunks(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(f16, tmp_path / "a.gguf", high="Q8_0", threads=1)
    monkeypatch.setattr(writer, "CHUNK_ELEMENTS", 1000)
    convert(f16, tmp_path / "b.gguf", high="Q8_0", threads=5)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_split_files_become_one(f16: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "s.gguf", split_max_tensors=3)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) > 2
    convert(parts[0], tmp_path / "a.gguf", high="Q8_0")
    convert(parts[-1], tmp_path / "b.gguf", high="Q8_0")  # any part will do
    convert(f16, tmp_path / "c.gguf", high="Q8_0")
    a, b, c = (tensors_of(tmp_path / n) for n in ("a.gguf", "b.gguf", "c.gguf"))
    assert not any(k.startswith("split.") for k in gguf.GGUFReader(tmp_path / "a.gguf").fields)
    for name, tensor in c.items():
        assert a[name].data.tobytes() == b[name].data.tobytes() == tensor.data.tobytes()

    with pytest.raises(ConvertError, match="is the input itself"):
        convert(parts[0], parts[1], high="Q8_0", force=True)
    parts[1].unlink()
    with pytest.raises(ConvertError, match=r"00002-of-.* is missing"):
        convert(parts[0], tmp_path / "d.gguf")
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ConvertError, match="restore the names"):
        convert(renamed, tmp_path / "d.gguf")


def test_a_converted_file_can_be_converted_again(f16: Path, tmp_path: Path) -> None:
    convert(f16, tmp_path / "a.gguf", high="Q8_0", low="Q4_0")
    report = convert(tmp_path / "a.gguf", tmp_path / "b.gguf", high="keep", low="Q5_0")
    assert "converted before" in report.fallbacks[0]
    a, b = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    assert set(a) == set(b)
    for name in a:
        if name.startswith(LOW_PREFIX):
            assert b[name].tensor_type == Quant.Q5_0
        else:
            assert a[name].data.tobytes() == b[name].data.tobytes()
    convert(tmp_path / "b.gguf", tmp_path / "c.gguf", low=None)
    assert not any(n.startswith(LOW_PREFIX) for n in tensors_of(tmp_path / "c.gguf"))


def test_reads_stay_small_and_each_byte_is_read_once(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr(job, "verify", lambda *_: None)
    sizes: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(b) for b in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    report = convert(f16, tmp_path / "out.gguf", high="Q8_0")
    assert max(sizes) <= 4096 * 4
    assert sum(sizes) == report.bytes_source == sum(t.n_bytes for t in tensors_of(f16).values())


def test_short_reads_and_writes_are_completed(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(f16, tmp_path / "a.gguf", high="Q8_0")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][: max(1, len(bufs[0]) // 3)]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 3)], at))
    convert(f16, tmp_path / "b.gguf", high="Q8_0")
    monkeypatch.undo()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_progress_lines_without_a_terminal(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hobbit_cpp.convert import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    convert(f16, tmp_path / "out.gguf", progress=True)
    assert "100%" in capsys.readouterr().err
    convert(f16, tmp_path / "out.gguf", progress=False, force=True)
    assert capsys.readouterr().err == ""


def test_ggml_reads_the_file(f16: Path, tmp_path: Path) -> None:
    """llama.cpp's own parser is strict about the order and the places of tensors."""

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    out = tmp_path / "out.gguf"
    convert(f16, out, high="Q8_0", low="Q4_K")
    from hobbit_cpp._lib import LIB_DIR

    ggml = ctypes.CDLL(str(LIB_DIR / "libggml-base.so"))
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_get_n_tensors.argtypes = ggml.gguf_free.argtypes = [ctypes.c_void_p]
    ggml.gguf_get_n_tensors.restype = ctypes.c_int64
    parsed = ggml.gguf_init_from_file(str(out).encode(), Params(True, None))
    assert parsed
    assert ggml.gguf_get_n_tensors(parsed) == len(tensors_of(out))
    ggml.gguf_free(parsed)


# ---- failures --------------------------------------------------------------------------------------------


def assert_refused(src: Path, dst: Path, message: str, **options: Any) -> None:
    before = sorted(dst.parent.iterdir()) if dst.parent.is_dir() else []
    with pytest.raises(ConvertError, match=message) as e:
        convert(src, dst, **options)
    assert "\n" not in str(e.value)
    assert (sorted(dst.parent.iterdir()) if dst.parent.is_dir() else []) == before, "a file was left"


def test_a_truncated_file_is_refused_wherever_it_ends(f16: Path, tmp_path: Path) -> None:
    data = f16.read_bytes()
    src = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 20, 100, 500, len(data) // 2, len(data) - 4096):
        src.write_bytes(data[:size])
        assert_refused(src, tmp_path / "out.gguf", "truncated" if size >= 4 else "not a GGUF")


def test_what_is_not_a_model_is_refused(f16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    src = tmp_path / "in.gguf"
    src.write_bytes(b"PK\x03\x04" + b"x" * 1000)
    assert_refused(src, out, "not a GGUF")
    big = gguf.GGUFWriter(src, "qwen3moe", endianess=gguf.GGUFEndian.BIG)
    big.add_tensor("a", np.zeros(4, np.float32))
    big.write_header_to_file()
    big.write_kv_data_to_file()
    big.write_tensors_to_file()
    big.close()
    assert_refused(src, out, "big-endian")
    assert_refused(make_model(src, moe=False), out, "dense model")
    src.write_bytes(b"GGUF\x01\x00\x00\x00" + b"\x00" * 100)
    assert_refused(src, out, "version 1")
    assert_refused(tmp_path / "missing.gguf", out, "cannot read .*No such file")
    assert_refused(tmp_path, out, "not a file")


def test_a_type_this_ggml_does_not_know_is_refused(tmp_path: Path) -> None:
    src = tmp_path / "in.gguf"
    head = write_header({}, [TensorInfo("blk.0.ffn_up_exps.weight", (32, 2, 2), 200, 0)])
    src.write_bytes(head + bytes(10000))
    assert_refused(src, tmp_path / "out.gguf", "type 200")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(f16: Path, tmp_path: Path) -> None:
    src = tmp_path / "in.gguf"
    shutil.copy(f16, src)
    src.chmod(0)
    assert_refused(src, tmp_path / "out.gguf", "Permission denied")


def test_an_unreadable_file_is_refused(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert_refused(f16, tmp_path / "out.gguf", "cannot read .*Permission denied")


def test_a_read_error_names_the_file_and_place(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert_refused(f16, tmp_path / "out.gguf", r"cannot read .*model.gguf at byte \d+: Input/output error")


def test_nothing_is_overwritten_without_force(f16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    assert_refused(f16, out, "use --force")
    assert out.read_text() == "precious"
    convert(f16, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert sorted(tmp_path.iterdir()) == [out]


def test_the_input_is_never_the_output(f16: Path, tmp_path: Path) -> None:
    src = tmp_path / "in.gguf"
    shutil.copy(f16, src)
    (tmp_path / "symbolic.gguf").symlink_to(src)
    os.link(src, tmp_path / "hard.gguf")
    for name in ("in.gguf", "symbolic.gguf", "hard.gguf", "../" + tmp_path.name + "/in.gguf"):
        assert_refused(src, tmp_path / name, "is the input itself", force=True)
    assert src.read_bytes() == f16.read_bytes()


def test_a_link_to_the_output_stays_a_link(f16: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "real.gguf")
    convert(f16, link)
    assert link.is_symlink() and (tmp_path / "real.gguf").read_bytes()[:4] == b"GGUF"


def test_an_output_that_cannot_be_is_refused(f16: Path, tmp_path: Path) -> None:
    assert_refused(f16, tmp_path, "is a folder")
    assert_refused(f16, tmp_path / "no" / "out.gguf", "not a folder")
    assert_refused(f16, Path("/dev/null"), "not a regular file", force=True)


def test_too_little_space_is_found_before_anything_is_written(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stat:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Stat)
    assert_refused(f16, tmp_path / "out.gguf", r"not enough space .*needed.*free .*and 12288 bytes")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_disk_that_becomes_full_leaves_nothing(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = 0
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_refused(f16, tmp_path / "out.gguf", "disk became full.*make .* free")


def test_a_file_size_limit_is_told(f16: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_cli("convert", str(f16), "-o", str(tmp_path / "out.gguf"), preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("raise the limit (ulimit -f)")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_in_the_weights_is_refused(tmp_path: Path) -> None:
    src = make_model(tmp_path / "in.gguf", nan=True)
    assert_refused(
        src, tmp_path / "out.gguf", r"ffn_gate_exps.weight, rows from 0: row 98, column 3 holds nan", high="Q8_0"
    )


def test_damage_on_the_way_to_the_disk_is_found(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def damage(fd: int, data: memoryview, offset: int) -> int:
        broken = bytearray(data)
        if offset > 0:
            broken[0] ^= 0x10
        return real(fd, broken, offset)

    monkeypatch.setattr(os, "pwrite", damage)
    assert_refused(f16, tmp_path / "out.gguf", "what was written is not what was")


def test_an_interruption_leaves_nothing(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(f16, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def run_cli(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit_cpp", *args], capture_output=True, text=True, timeout=120, **options
    )


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(f16: Path, tmp_path: Path, number: int, code: int) -> None:
    slow = (
        "import os, signal, sys, time\n"
        # Whoever started the tests in the background may have had it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = os.pwrite\n"
        "def pwrite(*a):\n"
        "    time.sleep(0.2)\n"
        "    return real(*a)\n"
        "os.pwrite = pwrite\n"
        "from hobbit_cpp.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "convert", str(f16), "-o", str(tmp_path / "out.gguf"), "--high", "Q8_0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(tmp_path.iterdir()) or process.poll() is not None)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---- ggml's quantisers behind the C API -------------------------------------------------------------------


def test_the_type_table_is_ggmls() -> None:
    types = load_types()
    for name, (number, block, size) in _TYPES.items():
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
