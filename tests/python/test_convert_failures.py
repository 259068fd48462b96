"""hobbit_cpp.convert: every way it can fail."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import assert_refused, make_model, run_cli, wait_for
from hobbit_cpp.convert import convert
from hobbit_cpp.convert.header import TensorInfo, write_header

# ---- failures --------------------------------------------------------------------------------------------


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


def test_too_little_space_is_found_before_anything_is_written(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stat:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Stat)
    assert_refused(f16, tmp_path / "out.gguf", r"not enough space .*needed.*free .*and 12288 bytes")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_disk_that_becomes_full_leaves_nothing(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
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
    assert_refused(src, tmp_path / "out.gguf", r"ffn_gate_exps.weight, rows from 0: row 98, column 3 holds nan", high="Q8_0")


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
