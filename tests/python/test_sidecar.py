"""Sidecars: low-precision copies beside a model that stays as it is, bound to it, found by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tiny_models
from decode import load, logits, stock_logits, words
from gguf_files import assert_refused, run_cli, tensors_of
from hobbit_cpp import Llama, ModelFileError, ModelFormatError, OffloadParams, ParameterError, SidecarError
from hobbit_cpp._handle import fingerprint
from hobbit_cpp._session import Session
from hobbit_cpp._sidecar import find_sidecar, sidecar_path
from hobbit_cpp.cli import main
from hobbit_cpp.convert import ConvertError, convert, job, writer
from hobbit_cpp.convert.plan import LOW_PREFIX
from models import tiny, tiny_dual

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

SHAPE = "qwen3moe"
MIXED = OffloadParams(precision_rule="weight", t1=0.3, t2=0.6)


def opens(path: Path, low_model: Any = None) -> Session:
    return Session(str(path), OffloadParams(low_model=low_model))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """model.gguf with its sidecar, alone in a folder."""
    path = tmp_path / "model.gguf"
    shutil.copy(tiny(SHAPE, "Q8_0"), path)
    convert(path, sidecar=True)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model of the same shapes and types."""
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "other.gguf"
    tiny_models.write_tiny(path, SHAPE, expert_type="Q8_0", seed=1)
    return path


def test_a_sidecar_holds_the_low_copies_and_nothing_else(model: Path) -> None:
    whole = convert(model, model.with_name("whole.gguf"), low="IQ4_NL")
    low = sidecar_path(model)
    assert low == model.with_name("model.low.gguf")
    made, want = tensors_of(low), tensors_of(whole.path)
    assert set(made) == {n for n in want if n.startswith(LOW_PREFIX)}
    for name, tensor in made.items():
        assert tensor.data.tobytes() == want[name].data.tobytes() and tensor.data_offset % 4096 == 0
    fields = {k: f.contents() for k, f in gguf.GGUFReader(low).fields.items() if not k.startswith("GGUF.")}
    assert fields.pop("hobbit.converter").startswith("hobbit-cpp ")
    assert fields == {
        "general.architecture": "hobbit-sidecar",
        "general.alignment": 4096,
        "general.quantization_version": 2,
        "hobbit.version": 1,
        "hobbit.low_type": "IQ4_NL",
        "hobbit.source": "model.gguf",
        "hobbit.sidecar.fingerprint": fingerprint(str(model)),
    }


def test_model_and_sidecar_are_what_one_file_is(model: Path, tmp_path: Path) -> None:
    one = convert(model, tmp_path / "one.gguf").path
    outs = []
    for path in (model, one):
        llm = load(Llama, str(path), 1, offload=MIXED)
        assert llm.offload_info.has_low
        outs.append(logits(llm, words(llm, 24), 4))
        stats = llm.offload_stats()
        assert stats.loads_low + stats.hits_low > 0
        llm.close()
    assert np.array_equal(outs[0], outs[1])


def test_the_model_stays_what_it_is(model: Path, tmp_path: Path) -> None:
    assert model.read_bytes() == tiny(SHAPE, "Q8_0").read_bytes()
    llm = load(Llama, str(model), 1, offload="hobbit", exact=True)
    prompt = words(llm, 30)
    assert np.array_equal(logits(llm, prompt, 16), stock_logits(model, prompt, 16, tmp_path, 1))
    llm.close()


def test_it_is_found_by_its_name(model: Path, tmp_path: Path) -> None:
    assert opens(model).info.has_low and opens(model).low_path == sidecar_path(model)
    assert not opens(model, False).info.has_low
    assert not opens(model, "none").info.has_low
    # renamed together
    sidecar_path(model).rename(tmp_path / "new name.low.gguf")
    model = model.rename(tmp_path / "new name.gguf")
    assert opens(model).info.has_low
    # and given, wherever it is
    (tmp_path / "elsewhere").mkdir()
    low = sidecar_path(model).rename(tmp_path / "elsewhere" / "x.gguf")
    assert not opens(model).info.has_low
    assert opens(model, low).info.has_low and opens(model, str(low)).info.has_low
    with pytest.raises(ModelFileError, match=r"no file .*nothing.gguf"):
        opens(model, tmp_path / "nothing.gguf")


def test_names_of_all_kinds(tmp_path: Path) -> None:
    names = {
        "m.gguf": "m.low.gguf",
        "m.GGUF": "m.low.gguf",
        "m": "m.low.gguf",
        "m.bin": "m.bin.low.gguf",
        "m-00001-of-00003.gguf": "m.low.gguf",
        "m-00002-of-00003.gguf": "m.low.gguf",
    }
    for name, low in names.items():
        assert sidecar_path(tmp_path / name) == tmp_path / low
        assert find_sidecar(tmp_path / name) is None
    (tmp_path / "m.low-00001-of-00002.gguf").touch()
    assert find_sidecar(tmp_path / "m.gguf") == tmp_path / "m.low-00001-of-00002.gguf"
    (tmp_path / "m.low.gguf").touch()
    assert find_sidecar(tmp_path / "m.gguf") == tmp_path / "m.low.gguf"


def test_llama_and_the_command_line_take_one(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low = sidecar_path(model).rename(tmp_path / "elsewhere.gguf")
    for given, has_low in ((low, True), (str(low), True), (None, False), (False, False)):
        llm = Llama(str(model), offload="hobbit", low_model=given, n_ctx=64, verbose=False)
        assert llm.offload_info.has_low is has_low
        llm.close()
    llm = Llama(str(model), offload=OffloadParams(low_model=low), n_ctx=64, verbose=False)
    assert llm.offload_info.has_low
    llm.close()
    with pytest.raises(ParameterError, match="low_model needs an offload"):
        Llama(str(model), low_model=low, verbose=False)
    Llama(str(model), low_model=False, n_ctx=64, verbose=False).close()

    flags = ["run", str(model), "-p", "the", "-n", "2", "-c", "64", "--temp", "0", "--precision-rule", "weight"]
    assert main([*flags, "--low-model", str(low)]) == 0
    assert main([*flags, "--low-model", str(tmp_path / "x")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_a_split_model_and_a_split_sidecar(model: Path, tmp_path: Path) -> None:
    parts = convert(model, tmp_path / "s.gguf", low=None, split_max_bytes=1 << 20).paths
    low = convert(parts[1], sidecar=True).path  # any part will do
    assert low == tmp_path / "s.low.gguf"
    assert opens(parts[0]).info.has_low
    # the same weights in one file, so the same sidecar
    assert fingerprint(str(parts[0])) == fingerprint(str(model))
    assert opens(model, low).info.has_low
    low.unlink()
    pieces = convert(parts[0], sidecar=True, split_max_bytes=1 << 20).paths
    assert len(pieces) > 2 and pieces[0].name.startswith("s.low-00001-of-")
    session = opens(parts[0])
    assert session.info.has_low and session.low_path == pieces[0]
    pieces[1].unlink()
    with pytest.raises(ModelFileError, match=r"s.low-00002-of"):
        opens(parts[0])


def test_the_wrong_sidecar_is_refused(model: Path, other: Path) -> None:
    low = convert(other, sidecar=True).path
    with pytest.raises(SidecarError, match=r"other.low.gguf does not belong to .*model.gguf: it was made for .*\(other.gguf\)"):
        opens(model, low)
    assert issubclass(SidecarError, ModelFormatError)
    shutil.copy(low, sidecar_path(model))
    with pytest.raises(SidecarError, match=r"does not belong .*remove it, name another with low_model=.*low_model=False"):
        opens(model)
    assert opens(model, False).info.n_expert == 8
    with pytest.raises(SidecarError, match=r"does not belong"):
        Llama(str(model), offload="hobbit", verbose=False)


@pytest.mark.parametrize(("what", "to"), [("F16", "type"), ("n_expert", "experts")])
def test_the_same_model_in_another_shape_or_type_is_another(model: Path, tmp_path: Path, what: str, to: str) -> None:
    path = tmp_path / "x.gguf"
    options: dict[str, Any] = {"expert_type": "F16"} if what == "F16" else {"expert_type": "Q8_0", "n_expert": 16}
    tiny_models.write_tiny(path, SHAPE, **options)
    with pytest.raises(SidecarError, match=r"does not belong"):
        opens(path, sidecar_path(model))


def test_what_is_no_sidecar_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match=r"is not a sidecar: make one with"):
        opens(model, tiny(SHAPE))
    low = sidecar_path(model)
    data = low.read_bytes()
    for size in (0, 3, 1000, len(data) // 2, len(data) - 5000):
        low.write_bytes(data[:size])
        with pytest.raises(SidecarError, match=r"model.low.gguf .*(not a readable GGUF|cut short).*low_model=False"):
            opens(model)
    low.write_bytes(data)
    # a sidecar is not a model
    for offload in ("hobbit", "lru"):
        with pytest.raises(ModelFormatError, match=r"is a sidecar, .*open the model it was made for, model.gguf"):
            Llama(str(low), offload=offload, verbose=False)
    assert_refused(low, tmp_path / "out.gguf", "is a sidecar")


def test_a_model_with_copies_takes_no_sidecar(model: Path, tmp_path: Path) -> None:
    assert_refused(tiny_dual(SHAPE), tmp_path / "x.gguf", "has low-precision copies already", sidecar=True)
    dual = shutil.copy(tiny_dual(SHAPE), tmp_path / "dual.gguf")
    shutil.copy(sidecar_path(model), tmp_path / "dual.low.gguf")
    with pytest.raises(SidecarError, match=r"has low-precision copies already.*low_model=False"):
        opens(Path(dual))


def test_options_that_do_not_go_with_a_sidecar(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert_refused(model, out, "leaves the model as it is", sidecar=True, high="Q4_0")
    assert_refused(model, out, "would be empty", sidecar=True, low=None)
    with pytest.raises(ConvertError, match="exists: use --force"):
        convert(model, sidecar=True)
    convert(model, sidecar=True, low="Q5_0", force=True)
    assert_refused(model, model, "is the input itself", sidecar=True, force=True)


def test_a_model_replaced_while_its_sidecar_is_made(model: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer.write_data

    def replace_first(*args: Any) -> None:
        real(*args)
        shutil.copy(other, model.with_name("new"))
        model.with_name("new").rename(model)

    monkeypatch.setattr(job, "write_data", replace_first)
    with pytest.raises(ConvertError, match=r"model.gguf changed while it was read"):
        convert(model, sidecar=True, force=True)


def test_the_command(tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny(SHAPE, "Q8_0"), tmp_path / "model.gguf"))
    done = run_cli("convert", str(path), "--sidecar", "--low", "Q4_K")
    assert done.returncode == 0 and "model.low.gguf" in done.stderr and "Q4_K" in done.stderr and "dense" not in done.stderr
    done = run_cli("convert", str(path), "--sidecar")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("exists: use --force to replace it")


def test_a_fingerprint_reads_little(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tiny_models.write_tiny(path, "mixtral", expert_type="Q8_0", n_layer=2, n_ff_exp=1024)
    before = _read_bytes()
    fingerprint(str(path))
    assert _read_bytes() - before < path.stat().st_size // 4


def _read_bytes() -> int:
    """What this process has read, from the page cache or not."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("rchar")))
