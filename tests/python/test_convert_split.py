"""Split GGUFs: written as llama.cpp names and numbers them, read whatever is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from decode import load, logits, stock_logits, words
from gguf_files import assert_refused, make_model, tensors_of
from hobbit_cpp import Llama
from hobbit_cpp.cli import main
from hobbit_cpp.convert import convert
from models import tiny, tiny_dual

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

PART = 200_000


def parts_of(folder: Path, stem: str) -> list[Path]:
    return sorted(folder.glob(f"{stem}-0*-of-0*.gguf"))


def split(src: Path, out: Path, size: int = PART, low: str | None = None) -> list[Path]:
    report = convert(src, out, low=low, split_max_bytes=size)
    assert list(report.paths) == parts_of(out.parent, out.name[:-5])
    assert report.path == report.paths[0]
    return list(report.paths)


def test_parts_hold_what_one_file_holds(f16: Path, tmp_path: Path) -> None:
    convert(f16, tmp_path / "whole.gguf", high="Q8_0")
    report = convert(f16, tmp_path / "s.gguf", high="Q8_0", split_max_bytes=PART)
    count = len(report.paths)
    assert [p.name for p in report.paths] == [f"s-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    assert count > 3 and report.bytes_file == sum(p.stat().st_size for p in report.paths)
    whole = tensors_of(tmp_path / "whole.gguf")
    found: dict[str, gguf.ReaderTensor] = {}
    hashes: set[str] = set()
    for number, path in enumerate(report.paths):
        reader = gguf.GGUFReader(path)
        assert path.stat().st_size <= PART or len(reader.tensors) == 1
        fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith("split.")}
        hashes.add(reader.fields["hobbit.split.model"].contents())
        assert fields == {"split.no": number, "split.count": count, "split.tensors.count": len(whole)}
        assert ("general.architecture" in reader.fields) == (number == 0)
        found.update({t.name: t for t in reader.tensors})
    assert list(found) == list(whole) and len(hashes) == 1
    for name, tensor in whole.items():
        assert found[name].data.tobytes() == tensor.data.tobytes() and found[name].data_offset % 4096 == 0
    assert sorted(tmp_path.iterdir()) == [*report.paths, tmp_path / "whole.gguf"]


def test_what_fits_into_one_part_is_one_file(f16: Path, tmp_path: Path) -> None:
    report = convert(f16, tmp_path / "s.gguf", split_max_bytes=1 << 30)
    assert report.paths == (tmp_path / "s.gguf",)
    assert not any(k.startswith("split.") for k in gguf.GGUFReader(tmp_path / "s.gguf").fields)


def test_the_name_of_a_part_names_all_parts(f16: Path, tmp_path: Path) -> None:
    made = convert(f16, tmp_path / "s-00001-of-00002.gguf", split_max_bytes=PART).paths
    assert list(made) == parts_of(tmp_path, "s") and len(made) > 2


def test_split_again_and_merged_again(f16: Path, tmp_path: Path) -> None:
    first = split(f16, tmp_path / "a.gguf")
    second = split(first[0], tmp_path / "b.gguf", 3 * PART)
    assert 1 < len(second) < len(first)
    convert(second[1], tmp_path / "c.gguf", low=None)
    convert(f16, tmp_path / "d.gguf", low=None)
    a, b = (tmp_path / n for n in ("c.gguf", "d.gguf"))
    assert {n: t.data.tobytes() for n, t in tensors_of(a).items()} == {n: t.data.tobytes() for n, t in tensors_of(b).items()}


def test_a_split_model_computes_what_the_whole_one_does(tmp_path: Path) -> None:
    """In stock llama.cpp, in ours, and offloaded."""
    path = tiny("qwen3moe", "Q8_0")
    parts = split(path, tmp_path / "s.gguf", 1 << 20)
    assert len(parts) > 3
    whole = load(Llama, str(path), 1)
    prompt = words(whole, 24)
    want = logits(whole, prompt, 16)
    whole.close()
    assert np.array_equal(stock_logits(parts[0], prompt, 16, tmp_path, 1), want)
    for offload in (None, "lru"):
        llm = load(Llama, str(parts[0]), 1, offload=offload)
        assert np.array_equal(logits(llm, prompt, 16), want)
        llm.close()


@pytest.mark.parametrize("shape", ["mixtral"])
def test_a_split_file_with_low_copies_runs(shape: str, tmp_path: Path) -> None:
    path = tiny_dual(shape)
    parts = convert(path, tmp_path / "s.gguf", split_max_bytes=1 << 20).paths
    whole = load(Llama, str(path), 1)
    prompt = words(whole, 24)
    want = logits(whole, prompt, 16)
    whole.close()
    llm = load(Llama, str(parts[0]), 1, offload="hobbit", exact=True)
    assert llm.offload_info.has_low
    assert np.array_equal(logits(llm, prompt, 16), want)
    llm.close()


# ---- what is wrong with parts ----------------------------------------------------------------------------


def engine_refuses(path: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        Llama(str(path), offload="hobbit", verbose=False)


def test_a_missing_part_is_named(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    parts[2].unlink()
    assert_refused(parts[0], tmp_path / "out.gguf", "s-00003-of-.* is missing")
    engine_refuses(parts[0], "s-00003-of-.*No such file")


def test_another_part_than_the_first_is_told_which_to_open(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    engine_refuses(parts[1], r"open the part called \*-00001-of-")


def test_parts_in_the_wrong_order_are_refused(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    assert_refused(parts[0], tmp_path / "out.gguf", "00002-of-.* says that it is part 3 of")
    engine_refuses(parts[0], "00002-of-.* says that it is not part 2")


def test_parts_of_different_models_are_refused(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    # as many parts, of the same names, types and shapes
    other = split(make_model(tmp_path / "other.gguf", name="another"), tmp_path / "t.gguf")
    assert len(other) == len(parts)
    os.replace(other[3], parts[3])
    assert_refused(parts[0], tmp_path / "out.gguf", "00004-of-.* is part of another model")
    engine_refuses(parts[0], "00004-of-.* is part of another model")


def test_parts_of_other_programs_are_told_apart_by_the_number_of_tensors(tmp_path: Path) -> None:
    make_model(tmp_path / "a.gguf", split_max_tensors=5)
    make_model(tmp_path / "b.gguf", n_layer=3, split_max_tensors=7)
    a, b = parts_of(tmp_path, "a"), parts_of(tmp_path, "b")
    assert len(a) == len(b) == 2
    os.replace(b[1], a[1])
    assert_refused(a[0], tmp_path / "out.gguf", "do not belong together")
    engine_refuses(a[0], "do not belong together|does not agree|occurs twice")


# ---- what is written -------------------------------------------------------------------------------------


def test_parts_are_not_overwritten_without_force(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    parts[0].unlink()
    parts[1].write_text("precious")
    assert_refused(f16, tmp_path / "s.gguf", "00002-of-.* exists: use --force", low=None, split_max_bytes=PART)
    assert parts[1].read_text() == "precious"
    convert(f16, tmp_path / "s.gguf", low=None, split_max_bytes=PART, force=True)
    assert parts_of(tmp_path, "s") == parts


def test_a_part_of_the_input_is_never_the_output(f16: Path, tmp_path: Path) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    before = [p.read_bytes() for p in parts]
    assert_refused(parts[0], tmp_path / "s.gguf", "is the input itself", low=None, split_max_bytes=PART, force=True)
    assert [p.read_bytes() for p in parts] == before


def test_old_and_new_parts_never_make_one_model(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(f16, tmp_path / "s.gguf")
    real, n = os.replace, 0

    def replace(src: Path, dst: Path) -> None:
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        real(src, dst)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        convert(f16, tmp_path / "s.gguf", high="BF16", low=None, split_max_bytes=PART, force=True)
    assert not parts[0].exists() and not list(tmp_path.glob("*.partial*"))


def test_a_failure_in_the_last_part_leaves_none(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.ftruncate
    calls = 0

    def full(fd: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        real(fd, size)

    monkeypatch.setattr(os, "ftruncate", full)
    assert_refused(f16, tmp_path / "s.gguf", "disk became full", split_max_bytes=PART)


@pytest.mark.parametrize(("text", "size"), [("150000", 150_000), ("1M", 1_000_000), ("1MiB", 1 << 20), ("1G", None)])
def test_sizes_are_llama_cpps(f16: Path, tmp_path: Path, text: str, size: int | None) -> None:
    assert main(["convert", str(f16), "-o", str(tmp_path / "s.gguf"), "-q", "--low", "none", "--split-max-size", text]) == 0
    made = sorted(tmp_path.iterdir())
    if size is None:
        assert made == [tmp_path / "s.gguf"]
        return
    for path in made:
        assert path.stat().st_size <= size or len(gguf.GGUFReader(path).tensors) == 1


def test_a_size_that_is_none_is_wrong_usage(f16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-1", "large", "2X"):
        assert main(["convert", str(f16), "-o", str(tmp_path / "s.gguf"), f"--split-max-size={text}"]) == 2
    assert "is not a size" in capsys.readouterr().err
    assert main(["convert", str(f16), "-q"]) == 2
    assert "-o OUT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
