"""hobbit_cpp.convert: what is written."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import N_EXPERT, N_LAYER, Quant, floats_of, is_routed, make_model, tensors_of
from hobbit_cpp.convert import ConvertError, convert, job, writer
from hobbit_cpp.convert.header import read_header
from hobbit_cpp.convert.plan import ALIGNMENT, LOW_PREFIX
from models import tiny_wordy

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
        "hobbit.low_type": "mixed",  # Q4_K, but IQ4_NL where rows are 96 long
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


def test_reads_stay_small_and_each_byte_is_read_once(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def _cached_bytes(path: Path) -> int:
    """Of a file, in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        begin = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), pages) == 0
        finally:
            del begin
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_no_page_cache_is_left_behind(tmp_path: Path) -> None:
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    shutil.copy(tiny_wordy(), source)
    fd = os.open(source, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if _cached_bytes(source) > source.stat().st_size // 100:
        pytest.skip("this file system keeps all pages (tmpfs)")
    convert(source, out, high="Q8_0")
    for path in (source, out):
        assert _cached_bytes(path) < 4 << 20, path


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
    monkeypatch.setattr("hobbit_cpp._progress._LINE_SECONDS", 0.0)
    convert(f16, tmp_path / "out.gguf", progress=True)
    assert "converting: " in capsys.readouterr().err
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
