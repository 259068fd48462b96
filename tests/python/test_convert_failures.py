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

from gguf_files import assert_refused, make_model, run_cli, tensors_of, wait_for
from hobbit_cpp.convert import ConvertError, convert, job, writer
from hobbit_cpp.convert.header import TensorInfo, write_header
from hobbit_cpp.convert.plan import LOW_PREFIX


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


# What main() runs in a process of its own, with writes that take their time.
_SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
real = os.pwrite
def pwrite(*a):
    time.sleep(0.2)
    return real(*a)
os.pwrite = pwrite
from hobbit_cpp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def convert_slowly(src: Path, dst: Path, *more: str) -> subprocess.Popen[str]:
    """A conversion in another process that has begun to write."""
    known = set(dst.parent.iterdir())
    command = [sys.executable, "-c", _SLOW, "convert", str(src), "-o", str(dst), "--high", "Q8_0", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: bool(set(dst.parent.iterdir()) - known) or process.poll() is not None)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(f16: Path, tmp_path: Path, number: int, code: int) -> None:
    process = convert_slowly(f16, tmp_path / "out.gguf")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", [[], ["--split-max-size", "200000"]])
def test_what_a_killed_conversion_left_is_removed_by_the_next(f16: Path, tmp_path: Path, split: list[str]) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    keep = [tmp_path / n for n in ("out.gguf.partial-x", "out2.gguf.partial-7", "out.gguf.bak")]
    for path in keep:
        path.write_text("of others")
    process = convert_slowly(f16, out, "--force", *split)
    process.kill()
    process.communicate(timeout=60)
    left = set(tmp_path.iterdir()) - {out, *keep}
    assert left and all(".partial-" in path.name for path in left)
    assert out.read_text() == "precious"
    convert(f16, out, force=True)
    assert set(tmp_path.iterdir()) == {out, *keep}
    assert out.read_bytes()[:4] == b"GGUF"


def test_two_conversions_to_one_name_do_not_disturb_each_other(f16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    process = convert_slowly(f16, out, "--force")
    convert(f16, out, low=None)
    assert process.poll() is None, "it should still be at work"
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert list(tmp_path.iterdir()) == [out]
    assert LOW_PREFIX + "blk.0.ffn_up_exps.weight" in tensors_of(out)  # of the last to finish


def test_without_force_the_last_to_finish_gives_way(f16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    process = convert_slowly(f16, out)
    convert(f16, out, low=None)
    made = out.read_bytes()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "was made by someone else meanwhile" in err
    assert out.read_bytes() == made and list(tmp_path.iterdir()) == [out]


def test_a_full_disk(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one. That there is too little room would be noticed before: so there seems to be enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        (disk / "out.gguf").write_text("precious")
        assert_refused(f16, disk / "out.gguf", "not enough space", force=True)
        with monkeypatch.context() as m:
            m.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 10**6, 10**6, 10**6, 0, 0, 0, 0, 255)))
            assert_refused(f16, disk / "out.gguf", "disk became full", force=True)
        assert (disk / "out.gguf").read_text() == "precious"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written_to(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert_refused(f16, tmp_path / "out.gguf", "cannot write .*out.gguf: Read-only file system")


@pytest.mark.parametrize("how", ["replaced", "written to", "cut", "removed"])
def test_an_input_that_changes_meanwhile_is_noticed(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    src = Path(shutil.copy(f16, tmp_path / "in.gguf"))
    real = writer.write_data

    def write_and_change(*args: Any) -> None:
        if how == "cut":
            os.truncate(src, src.stat().st_size // 2)
        real(*args)
        if how == "replaced":
            shutil.copy(f16, tmp_path / "new")
            os.replace(tmp_path / "new", src)
        elif how == "written to":
            with open(src, "r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(b"x")
        elif how == "removed":
            src.unlink()

    monkeypatch.setattr(job, "write_data", write_and_change)
    out = tmp_path / "out.gguf"
    message = {"cut": "became shorter while it was read", "removed": "went away while"}.get(how, "changed while it was read")
    with pytest.raises(ConvertError, match=message):
        convert(src, out)
    assert not out.exists() and not list(tmp_path.glob("*.partial*"))


def test_a_failure_leaves_the_old_output_as_it_was(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    convert(f16, out)
    before = out.read_bytes()

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    assert_refused(f16, out, "cannot write .*Input/output error", force=True, high="Q8_0")
    assert out.read_bytes() == before
