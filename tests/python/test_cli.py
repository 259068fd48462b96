"""The command line: usage, errors in one line, exit codes, and `hobbit convert`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from hobbit_cpp.cli import main
from models import tiny, tiny_dual

Captured = pytest.CaptureFixture[str]

# ---- errors and usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["run"],
        ["run", "m.gguf", "-t", "0"],
        ["run", "m.gguf", "-t", "513"],
        ["plan", "m.gguf", "-t", "100000"],
        ["run", "m.gguf", "-c", "-1"],
        ["run", "m.gguf", "--offload", "disk"],
        ["run", "m.gguf", "-p", "x", "-f", "y"],
        ["convert", "in.gguf"],
        ["convert", "in.gguf", "-o", "out.gguf", "-t", "many"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["convert", "--help"]])
def test_help(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 0
    assert "usage: hobbit" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOBBIT_DEBUG", raising=False)
    not_gguf = tmp_path / "x.gguf"
    not_gguf.write_bytes(b"x" * 100)
    out = str(tmp_path / "o.gguf")
    for argv, message in [
        (["convert", str(tmp_path / "none.gguf"), "-o", out], "No such file"),
        (["convert", str(not_gguf), "-o", out], "not a GGUF"),
        (["convert", str(not_gguf), "-o", out, "-t", "0"], "threads must be at least 1"),
        (["run", str(tmp_path / "none.gguf"), "-p", "x"], "no such file"),
        (["run", str(not_gguf), "-p", "x", "--exact", "--precision-rule", "miss"], "--exact"),
        (["run", str(not_gguf), "-f", str(tmp_path / "none.txt")], "No such file"),
        (["run", str(not_gguf), "-p", "x", "--json-stats", str(tmp_path / "no" / "s.json")], "is not a folder"),
        (["run", str(tiny("mixtral")), "-p", "x", "--json-stats", str(tiny("mixtral"))], "is read, and would be replaced"),
        (["run", str(not_gguf), "-p", "x", "--json-stats", str(tiny_dual("mixtral"))], "is not text, and would be replaced"),
        (["run", str(tiny("mixtral")), "-p", "caf\udce9"], "-p is not UTF-8 text (byte 3)"),
        (["run", str(tiny("mixtral")), "-p", "x", "-sys", "caf\udce9"], "-sys is not UTF-8 text (byte 3)"),
        (["eval", str(tiny("mixtral")), "--text", str(not_gguf), "--target-mb", "0"], "--target-mb"),
        (["calibrate", str(tiny("mixtral")), "--text", str(not_gguf), "--tokens", "2"], "--tokens"),
    ]:
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert err.startswith("hobbit: ") and err.count("\n") == 1 and message in err


LOST = """
import ctypes, os, signal, time
from hobbit_cpp._log import CALLBACKS
from hobbit_cpp.cli.signals import sigint_is_heard

def callback():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

CALLBACKS.add(callback.__code__)
with sigint_is_heard():
    for lose in (ctypes.CFUNCTYPE(None)(callback), lambda: Dying().__class__):
        try:
            lose()
            time.sleep(30)
        except KeyboardInterrupt:
            print("heard")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_an_interrupt_is_heard_where_python_would_lose_it() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["heard", "heard"] and not done.stderr, done.stderr


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hobbit-cpp", "llama.cpp", "patches"]
    assert all(len(line.split()) > 1 for line in lines)


def test_commands_import_what_they_need_when_they_run() -> None:
    code = "import sys, hobbit_cpp.cli; print(*[m for m in ('numpy', 'llama_cpp', 'rich', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---- convert ---------------------------------------------------------------------------------------------


def small_model(path: Path) -> Path:
    w = gguf.GGUFWriter(path, "qwen3moe")
    x = np.random.default_rng(3).standard_normal((4, 8, 96), dtype=np.float32)
    w.add_tensor("output.weight", x[0])
    w.add_tensor("blk.0.ffn_up_exps.weight", x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_convert_reports_what_it_made(tmp_path: Path, capsys: Captured) -> None:
    src, out = small_model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    assert main(["convert", str(src), "-o", str(out), "--high", "Q8_0", "--low", "Q4_K"]) == 0
    stdout, err = capsys.readouterr()
    assert stdout == ""
    assert "note: Q4_K has blocks of 256, which do not divide rows of 96: IQ4_NL instead" in err
    assert "experts 4 in each of 1 layers" in err
    assert {t.name for t in gguf.GGUFReader(out).tensors} == {
        "output.weight",
        "blk.0.ffn_up_exps.weight",
        "hobbit.low.blk.0.ffn_up_exps.weight",
    }
    assert main(["convert", str(src), "-o", str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(src), "-o", str(out), "--low", "none", "-f", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
