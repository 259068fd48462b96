"""`hobbit run`: what it prints, where, and with which exit code. Against a model that is made up, and a real one."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import models
from fake_model import FakeModel
from hobbit_cpp.cli import generate as gen
from hobbit_cpp.cli import main
from hobbit_cpp.cli import run as run_command
from hobbit_cpp.cli.output import check_writable, write_json

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """use(model): `hobbit run` gets that model; returns the arguments it was asked for."""

    def install(model: FakeModel) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def load(args: argparse.Namespace, **more: Any) -> FakeModel:
            seen.update(vars(args))
            return model

        monkeypatch.setattr(run_command, "load_model", load)
        return seen

    return install


def test_run_streams_the_answer_to_stdout_and_the_summary_to_stderr(use: Any, capsys: Captured) -> None:
    model = FakeModel(["Hello", " big", " world"])
    use(model)
    assert main(["run", "m.gguf", "-p", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello big world"
    assert model.calls[0][:2] == ("chat", [{"role": "user", "content": "hi"}])
    assert model.closed
    lines = err.strip().splitlines()
    assert lines[0].startswith("prompt     7 tokens in ")
    assert lines[1].startswith("answer     2 tokens in ")  # the first came with the prompt
    assert lines[2].startswith("cache      hit rate 60.0%, 1.0 MB read a token")
    assert lines[3] == "experts    70.0% high precision, 20.0% low, 10.0% skipped"
    assert lines[4] == "memory     peak 3.00 GiB of a budget of 4.00 GiB"


def test_statistics_of_prompt_and_answer_are_apart(use: Any, tmp_path: Path) -> None:
    use(FakeModel(["a", "b", "c", "d"]))
    file = tmp_path / "stats.json"
    assert main(["run", "m.gguf", "-p", "hi", "--json-stats", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["prompt"]["tokens"] == report["prompt"]["offload"]["n_tokens"] == 7
    assert report["decode"]["tokens"] == report["decode"]["offload"]["n_tokens"] == 3
    assert report["decode"]["offload"]["hit_rate"] == 0.6
    assert report["decode"]["offload"]["bytes_per_token"] == 1e6
    assert report["decode"]["offload"]["bytes_read"] == 3_000_000
    assert report["decode"]["tokens_per_second"] > 0
    assert (report["finish_reason"], report["interrupted"]) == ("stop", False)


def test_statistics_to_stdout_replace_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with open(out, "wb") as f:
        done = subprocess.run(
            [sys.executable, "-c", "import sys, pathlib; from hobbit_cpp.cli.output import write_json, write_stdout; "
             "write_stdout('answer\\n'); write_json(pathlib.Path('/dev/stdout'), [1])"],
            stdout=f, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0 and out.read_text() == "answer\n[\n  1\n]\n"


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        for folder in (tmp_path, Path(shared)):
            file, link = folder / "a.json", folder / "link"
            link.symlink_to(file)
            write_json(file, [1])
            file.chmod(0o640)
            write_json(link, [2])
            assert json.loads(file.read_text()) == [2] and link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
            with pytest.raises(ValueError):
                write_json(file, [float("nan")])
            write_json(file, os.fsdecode(b"\xff.gguf"))
            assert json.loads(file.read_text()) == os.fsdecode(b"\xff.gguf")
            assert sorted(p.name for p in folder.iterdir()) == ["a.json", "link"]


def test_where_nothing_can_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a.json")
    check_writable(Path("/dev/stdout"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="no files can be made in"):
        check_writable(tmp_path / "a.json")
    check_writable(Path("/dev/stdout"))


def test_times_are_split_at_the_first_chunk() -> None:
    times = iter([10.0, 14.0, 20.0])
    model = FakeModel(["a", "b", "c"])
    answer = gen.generate(model, gen.Request("x", False, None, {}), lambda _: None, lambda: next(times))
    assert (answer.prompt.tokens, answer.prompt.seconds) == (7, 4.0)
    assert (answer.decode.tokens, answer.decode.seconds) == (2, 6.0)
    assert answer.decode.rate == pytest.approx(1 / 3)


def test_an_answer_that_ends_at_once(use: Any, capsys: Captured) -> None:
    use(FakeModel([]))
    assert main(["run", "m.gguf", "-p", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "answer     0 tokens" in err


def test_without_offload_there_is_a_summary_too(use: Any, capsys: Captured, tmp_path: Path) -> None:
    seen = use(FakeModel(["a"], offload=False))
    assert main(["run", "m.gguf", "-p", "x", "--offload", "none", "--json-stats", str(tmp_path / "s")]) == 0
    assert seen["offload"] == "none"
    err = capsys.readouterr().err
    assert "cache" not in err and "memory     peak " in err
    assert json.loads((tmp_path / "s").read_text())["decode"]["offload"] is None


def test_ctrl_c_ends_the_answer_with_the_summary(use: Any, capsys: Captured) -> None:
    model = FakeModel(["one", " two", KeyboardInterrupt()])
    use(model)
    assert main(["run", "m.gguf", "-p", "hi"]) == 130
    out, err = capsys.readouterr()
    assert out == "one two"
    assert "answer     1 tokens" in err and err.strip().endswith("interrupted")
    assert model.closed


class SlowModel(FakeModel):
    """Its prompt takes until somebody cancels."""

    def __init__(self) -> None:
        super().__init__(["never"])
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def create_chat_completion(self, *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        assert self.cancelled.wait(30), "nobody cancelled"
        raise RuntimeError("cancelled")
        yield {}


def test_ctrl_c_stops_the_reading_of_the_prompt(use: Any, capsys: Captured) -> None:
    model = SlowModel()
    use(model)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert main(["run", "m.gguf", "-p", "hi"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert model.closed


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_stops_the_loading(monkeypatch: pytest.MonkeyPatch, capsys: Captured, late: bool) -> None:
    model = FakeModel([])

    def load(args: argparse.Namespace, progress: Callable[[float], bool]) -> FakeModel:
        end = time.monotonic() + 30
        while progress(0.5):
            assert time.monotonic() < end, "nobody stopped it"
        if late:
            return model
        raise ValueError("failed to load")

    monkeypatch.setattr(run_command, "load_model", load)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert main(["run", "m.gguf", "-p", "hi"]) == 130
    assert capsys.readouterr().err == "hobbit: interrupted\n"
    assert model.closed == late


def test_a_failure_in_the_middle_is_one_line(use: Any, capsys: Captured) -> None:
    model = FakeModel(["one", RuntimeError("reading blk.3 failed:\n Input/output error")])
    use(model)
    assert main(["run", "m.gguf", "-p", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "one"
    assert err == "hobbit: reading blk.3 failed: Input/output error\n"
    assert model.closed


def test_sampling_flags_reach_the_model(use: Any) -> None:
    model = FakeModel(["a"])
    use(model)
    flags = ["-n12", "-s42", "--temp=0", "--top-k=5", "--top-p=0.5", "--min-p=0.1", "--repeat-penalty=1.3"]
    assert main(["run", "m.gguf", "-p", "x", "-sys", "be brief", *flags]) == 0
    kind, messages, sampling = model.calls[0]
    assert kind == "chat" and messages[0] == {"role": "system", "content": "be brief"}
    assert sampling == {
        "max_tokens": 12, "seed": 42, "temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.3,
    }  # fmt: skip


def test_defaults_are_llama_cpps(use: Any) -> None:
    model = FakeModel(["a"])
    use(model)
    main(["run", "m.gguf", "-p", "x"])
    sampling = model.calls[0][2]
    assert sampling.pop("seed") >= 0
    assert sampling == {
        "max_tokens": None, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("template", "flags"), [(False, []), (True, ["-no-cnv"]), (True, ["--no-conversation"])])
def test_raw_completion(use: Any, template: bool, flags: list[str]) -> None:
    model = FakeModel(["a"], template=template)
    use(model)
    assert main(["run", "m.gguf", "-p", "Once", *flags]) == 0
    assert model.calls[0][:2] == ("completion", "Once")


def test_a_system_prompt_needs_a_template(use: Any, capsys: Captured) -> None:
    use(FakeModel(["a"], template=False))
    assert main(["run", "m.gguf", "-p", "x", "-sys", "y"]) == 1
    assert "this model does not have" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_the_prompt_can_be_piped_in(use: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    model = FakeModel(["a"], template=False)
    use(model)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
    assert main(["run", "m.gguf", *flags]) == 0
    assert model.calls[0][1] == "two\nlines"


def test_the_prompt_can_be_a_file(use: Any, tmp_path: Path) -> None:
    model = FakeModel(["a"], template=False)
    use(model)
    (tmp_path / "p.txt").write_text("grüße\n", encoding="utf-8")
    assert main(["run", "m.gguf", "-f", str(tmp_path / "p.txt")]) == 0
    assert model.calls[0][1] == "grüße"


def test_no_prompt_is_an_error(use: Any, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    use(FakeModel(["a"]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["run", "m.gguf"]) == 1
    assert capsys.readouterr().err == "hobbit: the prompt is empty\n"


class FakeParams:
    def __init__(self, **given: Any) -> None:
        self.given = given


@pytest.mark.parametrize(
    ("flags", "offload"),
    [
        ([], {"mode": "hobbit"}),
        (["--offload", "lru", "--exact"], {"mode": "lru", "exact": True}),
        (["--precision-rule", "weight"], {"mode": "hobbit", "precision_rule": "weight"}),
        (["--expert-cache", "2GiB"], {"mode": "hobbit", "expert_cache": "2GiB"}),
        (["--expert-cache", "1000"], {"mode": "hobbit", "expert_cache": "1000"}),
        (["--offload", "none"], None),
    ],
)
def test_model_flags_reach_llama(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], offload: dict[str, Any] | None
) -> None:
    import hobbit_cpp

    seen: dict[str, Any] = {}

    def llama(path: str, **options: Any) -> FakeModel:
        seen.update(options, path=path)
        return FakeModel(["a"])

    monkeypatch.setitem(vars(hobbit_cpp), "Llama", llama)
    monkeypatch.setitem(vars(hobbit_cpp), "OffloadParams", FakeParams)
    model = tmp_path / "m.gguf"
    model.touch()
    numbers = ["-c", "1000", "-t", "3", "-tb", "4", "-b", "64", "-ub", "32"]
    attention = ["-fa", "off"] if "--exact" in flags else []
    assert main(["run", str(model), "-p", "x", "--memory", "50%", *numbers, *attention, *flags]) == 0
    params, progress = seen.pop("offload"), seen.pop("progress")
    assert progress(0.5) is True
    assert (params if params is None else params.given) == offload
    assert seen == {
        "path": str(model), "memory": "50%", "n_ctx": 1000, "n_threads": 3, "n_threads_batch": 4, "n_batch": 64,
        "n_ubatch": 32, "flash_attn": not attention, "verbose": False,
    }  # fmt: skip


def test_a_defect_names_its_kind_and_how_to_see_more(use: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeModel([KeyError("x")]))
    monkeypatch.delenv("HOBBIT_DEBUG", raising=False)
    assert main(["run", "m.gguf", "-p", "x"]) == 1
    assert capsys.readouterr().err == "hobbit: KeyError: 'x' (HOBBIT_DEBUG=1 shows where)\n"
    monkeypatch.setenv("HOBBIT_DEBUG", "1")
    assert main(["run", "m.gguf", "-p", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("HOBBIT_DEBUG")
    assert main(["run", "m.gguf", "-p", "x", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    endless = (
        "import sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "from fake_model import FakeModel\n"
        "from hobbit_cpp.cli import main, run\n"
        "run.load_model = lambda args, **more: FakeModel(['word '] * 1000000)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", endless, os.path.dirname(__file__), "run", "m.gguf", "-p", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141, err
    assert err == ""


# ---- a real model ----------------------------------------------------------------------------------------


def hobbit(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "hobbit_cpp", *args], capture_output=True, timeout=120, stdin=subprocess.DEVNULL)


def test_convert_and_run_a_real_model(tmp_path: Path) -> None:
    from tiny_models import write_tiny

    src, out, stats = tmp_path / "in.gguf", tmp_path / "out.gguf", tmp_path / "stats.json"
    write_tiny(src, "qwen3moe")
    done = hobbit("convert", str(src), "-o", str(out), "--high", "Q8_0", "--low", "Q4_0")
    assert done.returncode == 0, done.stderr

    def answer(*flags: str) -> bytes:
        common = ["-p", "the expert", "-n", "12", "--temp", "0", "-c", "128", "--json-stats", str(stats)]
        done = hobbit("run", str(out), *common, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stock = answer("--offload", "none")
    assert stock
    assert answer("--offload", "lru", "--exact") == stock
    # smaller than the experts, so that some have to be read again
    answer("--offload", "hobbit", "--expert-cache", "4MiB")
    report = json.loads(stats.read_text())
    for phase in ("prompt", "decode"):
        counts = report[phase]["offload"]
        assert counts["n_tokens"] == report[phase]["tokens"] > 0
        assert counts["selections"] > 0 and counts["bytes_read"] > 0
        assert counts["selections"] == sum(counts[name] for name in ("hits_high", "hits_low", "loads_high", "loads_low", "skips"))


@pytest.mark.parametrize("offload", ["hobbit", "none"])
def test_the_context_is_as_long_as_llama_cpp_makes_it(offload: str, tmp_path: Path) -> None:
    """llama.cpp rounds -c up to a multiple of 256."""
    stats = tmp_path / "stats.json"
    flags = ["-c", "40", "-t", "1", "-tb", "1", "--temp", "0", "--offload", offload, "--json-stats", str(stats)]
    done = hobbit("run", str(models.tiny_chat()), "-no-cnv", "-p", "the expert of the layer", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(stats.read_text())
    assert report["finish_reason"] == "stop" or report["prompt"]["tokens"] + report["decode"]["tokens"] == 255
