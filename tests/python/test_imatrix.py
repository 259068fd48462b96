"""Importance matrices of llama.cpp, in both formats, used for experts in either precision."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from gguf_files import FF, N_EXPERT, N_LAYER, D, assert_refused, floats_of, make_model, tensors_of
from hobbit_cpp.cli import main
from hobbit_cpp.convert import ConvertError, convert
from hobbit_cpp.convert.ggtypes import load_types
from hobbit_cpp.convert.imatrix import Imatrix
from hobbit_cpp.convert.plan import LOW_PREFIX, Tensor
from hobbit_cpp.convert.quantise import Quantiser
from models import tiny, tiny_dense

Floats = npt.NDArray[np.float32]
# name -> mean squares [expert, column], tokens [expert]
Data = dict[str, tuple[Floats, Floats]]

UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"


def importance(seed: int = 1, ff: int = FF) -> Data:
    """For all experts of `make_model`; counts are powers of two, so that means come back as they were."""
    rng = np.random.default_rng(seed)
    out: Data = {}
    for i in range(N_LAYER):
        for part, row in (("gate", D), ("up", D), ("down", ff)):
            means = np.exp(3 * rng.standard_normal((N_EXPERT, row))).astype(np.float32)
            out[f"blk.{i}.ffn_{part}_exps.weight"] = means, 2.0 ** rng.integers(0, 9, N_EXPERT).astype(np.float32)
    return out


def write_gguf(path: Path, data: Data, lists: dict[str, list[str]] | None = None, /, **more: npt.NDArray[Any]) -> Path:
    """As IMatrixCollector::save_imatrix of llama.cpp; `lists`: more metadata; `more`: tensors as they are."""
    w = gguf.GGUFWriter(path, "")
    w.add_type("imatrix")
    w.add_array("imatrix.datasets", ["wiki.txt"])
    w.add_uint32("imatrix.chunk_count", 3)
    w.add_uint32("imatrix.chunk_size", 512)
    for key, texts in (lists or {}).items():
        w.add_array(key, texts)
    for name, (means, counts) in sorted(data.items()):
        w.add_tensor(f"{name}.in_sum2", (means * counts.reshape(-1, 1)).astype(np.float32))
        w.add_tensor(f"{name}.counts", counts.reshape(-1, 1))
    for name, tensor in more.items():
        w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_legacy(path: Path, data: Data, calls: int = 8) -> Path:
    """As IMatrixCollector::save_imatrix_legacy."""
    out = [struct.pack("<i", len(data))]
    for name, (means, counts) in sorted(data.items()):
        values = np.where(counts.reshape(-1, 1) > 0, means, 1.0).astype("<f4") * np.float32(calls)
        out += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, values.size), values.tobytes()]
    out += [struct.pack("<ii", 3, 8), b"wiki.txt"]
    path.write_bytes(b"".join(out))
    return path


def tensor(name: str, n_expert: int = N_EXPERT, row: int = D) -> Tensor:
    return Tensor(name, (row, 8, n_expert), load_types().by_name["F16"])


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_gguf, write_legacy])
def test_means_are_read_for_each_expert(tmp_path: Path, write: Any) -> None:
    data = importance()
    with Imatrix(write(tmp_path / "imatrix", data)) as imatrix:
        assert imatrix.check([tensor(UP), tensor(DOWN, row=FF)]) == []
        assert imatrix.names == {UP, DOWN}
        for name in (UP, DOWN):
            found = imatrix.of(name)
            assert found is not None and found.missing == 0
            for expert in range(N_EXPERT):
                want = np.maximum(data[name][0][expert], data[name][0][expert].mean() * 1e-6)
                np.testing.assert_allclose(found.weights(expert), want, rtol=1e-5)
        assert imatrix.of("blk.0.ffn_gate_exps.weight") is None  # not asked for


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    """What llama.cpp makes of an old file: all values in a row, one count."""
    means = importance()[UP][0]
    path = write_gguf(
        tmp_path / "i", {}, **{f"{UP}.in_sum2": means.reshape(1, -1) * 5, f"{UP}.counts": np.full((1, 1), 5, np.float32)}
    )
    with Imatrix(path) as imatrix:
        imatrix.check([tensor(UP)])
        found = imatrix.of(UP)
        assert found is not None
        np.testing.assert_allclose(found.weights(2), np.maximum(means[2], means[2].mean() * 1e-6), rtol=1e-5)


def test_an_expert_without_data_gets_the_mean_of_the_others(tmp_path: Path) -> None:
    data = importance()
    means, counts = data[UP]
    counts[1] = 0
    with Imatrix(write_gguf(tmp_path / "i", data)) as imatrix:
        (note,) = imatrix.check([tensor(UP)])
        assert note == "1 experts of 1 tensors have no data in the importance matrix: the mean of the other experts is used"
        found = imatrix.of(UP)
        assert found is not None and found.missing == 1
        others = [0, 2, 3]
        want = (means[others] * counts[others, None]).sum(0) / counts[others].sum()
        np.testing.assert_allclose(found.weights(1), np.maximum(want, want.mean() * 1e-6), rtol=1e-4)


def test_columns_that_were_never_used_weigh_a_little(tmp_path: Path) -> None:
    data = importance()
    data[UP][0][0, :100] = 0
    data[UP][0][1] = 0  # seen, but always zero
    with Imatrix(write_gguf(tmp_path / "i", data)) as imatrix:
        imatrix.check([tensor(UP)])
        found = imatrix.of(UP)
        assert found is not None
        assert (found.weights(0) > 0).all() and found.weights(0)[:100].max() < 1e-5 * found.weights(0).max()
        assert (found.weights(1) == 1).all()


# ---- refused ---------------------------------------------------------------------------------------------


def refused(path: Path, message: str, *tensors: Tensor) -> None:
    with pytest.raises(ConvertError, match=message) as e, Imatrix(path) as imatrix:
        imatrix.check(tensors or [tensor(UP)])
        found = imatrix.of(UP)
        assert found is not None
        found.weights(1)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("write", [write_gguf, write_legacy])
def test_the_matrix_of_another_model_is_refused(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "i", importance())
    refused(path, "256 for each of 8: this importance matrix is of another model", tensor(UP, n_expert=8))
    refused(path, "of another model", tensor(UP, row=512))
    refused(path, "no data for any expert", tensor("blk.9.ffn_up_exps.weight"))


def test_damaged_files_are_refused(f16: Path, tmp_path: Path) -> None:
    refused(tmp_path / "missing", "cannot read .*No such file")
    refused(tmp_path, "not a file")
    refused(f16, "is a GGUF, but not an importance matrix")
    for name, data in (("empty", b""), ("zero", bytes(100)), ("text", b"hello, this is no importance matrix" * 10)):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "not an importance matrix of llama.cpp, or a damaged one")
    for write in (write_gguf, write_legacy):
        data = write(tmp_path / "i", importance()).read_bytes()
        for size in (10, 1000, len(data) // 2, len(data) - 5000):
            (tmp_path / "cut").write_bytes(data[:size])
            refused(tmp_path / "cut", "truncated|damaged one")
    refused(write_gguf(tmp_path / "i", {}, **{f"{UP}.in_sum2": np.ones((4, D), np.float32)}), "no counts of blk.0")
    for bad in (np.nan, np.inf, -1.0):
        spoilt = importance()
        spoilt[UP][0][1, 3] = bad
        refused(write_gguf(tmp_path / "i", spoilt), "expert 1: a value that is not finite or below zero")


# ---- converting ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("imatrix") / "model.gguf", ff=256)


@pytest.mark.parametrize(("write", "high", "low"), [(write_gguf, "Q4_K", "IQ2_XXS"), (write_legacy, "keep", "Q4_0")])
def test_experts_are_quantised_by_their_own_slice(model: Path, tmp_path: Path, write: Any, high: str, low: str) -> None:
    data = importance(ff=256)
    report = convert(model, tmp_path / "out.gguf", high=high, low=low, imatrix=write(tmp_path / "imatrix", data))
    assert report.low_type == low and report.fallbacks == ()
    types, quantiser = load_types(), Quantiser()
    made, source = tensors_of(tmp_path / "out.gguf"), tensors_of(model)
    for name in (UP, DOWN):
        values = floats_of(source[name])
        for made_name, kind in ((name, high), (LOW_PREFIX + name, low)):
            if kind == "keep":
                continue
            info = types.by_name[kind]
            for expert in range(N_EXPERT):
                weights = np.maximum(data[name][0][expert], np.float32(data[name][0][expert].mean() * np.float32(1e-6)))
                want = np.empty(values[expert].size // info.block * info.block_bytes, np.uint8)
                quantiser.quantise(info, values[expert].ravel(), want, values.shape[2], name, weights)
                assert made[made_name].data[expert].tobytes() == want.tobytes(), (made_name, expert)
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["hobbit.imatrix"].contents() == "imatrix"


def floats_of_bytes(quantiser: Quantiser, info: Any, data: npt.NDArray[np.uint8]) -> Floats:
    out = np.empty(data.size // info.block_bytes * info.block, np.float32)
    quantiser.to_float(info, np.ascontiguousarray(data), out, "x")
    return out


def test_it_makes_the_important_columns_better(model: Path, tmp_path: Path) -> None:
    data = importance(ff=256)
    weights = np.full((N_EXPERT, 256), 0.01, np.float32)
    weights[:, ::8] = 100.0
    data = {name: (weights, counts) for name, (_, counts) in data.items()}
    convert(model, tmp_path / "with.gguf", low="Q2_K", imatrix=write_gguf(tmp_path / "i", data))
    convert(model, tmp_path / "without.gguf", low="Q2_K")
    want = floats_of(tensors_of(model)[UP])[..., ::8]
    errors = [
        float(np.linalg.norm(floats_of(tensors_of(tmp_path / n)[LOW_PREFIX + UP])[..., ::8] - want))
        for n in ("with.gguf", "without.gguf")
    ]
    assert errors[0] < 0.7 * errors[1]


def test_types_that_need_one_say_so(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert_refused(model, out, "IQ2_XXS needs an importance matrix: give one with --imatrix", low="IQ2_XXS")
    data = importance(ff=256)
    del data[DOWN]
    path = write_gguf(tmp_path / "i", data)
    assert_refused(model, out, f"no data for {DOWN}, and IQ2_XXS needs it", low="IQ2_XXS", imatrix=path)
    report = convert(model, out, low="Q4_0", imatrix=path)
    assert f"no data for 1 expert tensors ({DOWN}): quantised without" in report.fallbacks[0]


def test_experts_without_data_are_told_and_quantised(model: Path, tmp_path: Path) -> None:
    data = importance(ff=256)
    data[UP][1][2] = 0
    data[DOWN][1][:] = 0  # none at all
    path = write_gguf(tmp_path / "i", data)
    report = convert(model, tmp_path / "out.gguf", low="Q4_0", imatrix=path)
    assert any("1 experts of 1 tensors have no data" in note for note in report.fallbacks)
    assert any(f"({DOWN}): quantised without" in note for note in report.fallbacks)
    assert_refused(model, tmp_path / "x.gguf", f"no data for {DOWN}", low="IQ2_XS", imatrix=path)


def test_ggml_survives_columns_without_importance() -> None:
    # IQ2_XS and IQ1_S do too: it takes ggml long to make their tables
    info, quantiser = load_types().by_name["IQ2_XXS"], Quantiser()
    x = np.random.default_rng(1).standard_normal(512, dtype=np.float32) * 0.03
    x[:64] = 0
    out = np.empty(info.row_bytes(512), np.uint8)
    for n in (0, 1, 100, 256, 511):
        weights = np.ones(256, np.float32)
        weights[:n] = 1e-6
        quantiser.quantise(info, x, out, 256, "x", weights)
        assert np.isfinite(floats_of_bytes(quantiser, info, out)).all()


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_legacy(tmp_path / "imatrix.dat", importance(ff=256))
    flags = ["convert", str(model), "--sidecar", "-o", str(tmp_path / "low.gguf"), "--low", "IQ2_XXS"]
    assert main([*flags, "--imatrix", str(path)]) == 0
    assert "IQ2_XXS" in capsys.readouterr().err
    assert main([*flags, "--force", "--imatrix", str(tmp_path / "missing")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hobbit: cannot read")


def test_force_replaces_neither_what_is_read_nor_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = tmp_path / "m.gguf", tmp_path / "t.txt"
    model.write_bytes(tiny("mixtral").read_bytes())
    text.write_text("a text")
    before = model.read_bytes()
    read, folder, device = "is read, and would be replaced", "is a folder", "not a file"
    for output, says in ((model, read), (text, read), (tmp_path, folder), ("/dev/null", device)):
        assert main(["imatrix", str(model), "--text", str(text), "-o", str(output), "-f"]) == 1
        assert says in capsys.readouterr().err
    assert model.read_bytes() == before and Path("/dev/null").is_char_device()


def test_a_dense_model_is_refused_before_it_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("a text")
    for command in ("imatrix", "trace"):
        assert main([command, str(tiny_dense()), "--text", str(text), "-o", str(tmp_path / "out")]) == 1
        assert "no routed experts" in capsys.readouterr().err
