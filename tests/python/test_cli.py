"""The command line: what it prints, where, and with which exit code. `hobbit run` against a model that is made up."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hobbit_cpp.cli import generate as gen
from hobbit_cpp.cli import main
from hobbit_cpp.cli import run as run_command
from hobbit_cpp.stats import OffloadStats

Captured = pytest.CaptureFixture[str]


class FakeModel:
    """Says `words`; a word that is an exception is raised instead."""

    def __init__(self, words: list[Any], template: bool = True, offload: bool = True) -> None:
        self.words = words
        self.metadata = {"tokenizer.chat_template": "x"} if template else {}
        self.offload = offload
        self.n_tokens = 0
        self.evaluated = 0  # since the reset
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.closed = False

    def _evaluate(self, n: int) -> None:
        self.n_tokens += n
        self.evaluated += n

    def _say(self) -> Iterator[tuple[str, str | None]]:
        self._evaluate(7)  # the prompt
        for i, word in enumerate(self.words):
            if isinstance(word, BaseException):
                raise word
            if i > 0:
                self._evaluate(1)
            yield word, None
        yield "", "stop"

    def create_completion(self, prompt: str, *, stream: bool, **sampling: Any) -> Iterator[dict[str, Any]]:
        assert stream
        self.calls.append(("completion", prompt, sampling))
        for text, reason in self._say():
            yield {"choices": [{"text": text, "finish_reason": reason}]}

    def create_chat_completion(
        self, messages: list[dict[str, str]], *, stream: bool, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        assert stream
        self.calls.append(("chat", messages, sampling))
        for i, (text, reason) in enumerate(self._say()):
            if i == 0:
                yield {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
            yield {"choices": [{"delta": {"content": text} if reason is None else {}, "finish_reason": reason}]}

    def offload_stats(self) -> OffloadStats:
        assert self.offload
        n = self.evaluated
        return OffloadStats(
            n_tokens=n,
            selections=10 * n,
            hits_high=5 * n,
            hits_low=n,
            loads_high=2 * n,
            loads_low=n,
            skips=n,
            bytes_demand=600_000 * n,
            bytes_prefetch=400_000 * n,
            peak_memory=3 << 30,
            memory_budget=4 << 30,
            recall={1: 0.5},
        )

    def reset_offload_stats(self) -> None:
        assert self.offload
        self.evaluated = 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """use(model): `hobbit run` gets that model; returns the arguments it was asked for."""

    def install(model: FakeModel) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def load(args: argparse.Namespace) -> FakeModel:
            seen.update(vars(args))
            return model

        monkeypatch.setattr(run_command, "load_model", load)
        return seen

    return install


# ---- run -------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
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
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
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
        (["--expert-cache", "1000"], {"mode": "hobbit", "expert_cache": 1000}),
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
    assert main(["run", str(model), "-p", "x", "--memory", "50%", *numbers, *flags]) == 0
    params = seen.pop("offload")
    assert (params if params is None else params.given) == offload
    assert seen == {
        "path": str(model), "memory": "50%", "n_ctx": 1000, "n_threads": 3, "n_threads_batch": 4, "n_batch": 64,
        "n_ubatch": 32, "verbose": False,
    }  # fmt: skip


# ---- errors and usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["run"],
        ["run", "m.gguf", "-t", "0"],
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
    ]:
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert err.startswith("hobbit: ") and err.count("\n") == 1 and message in err


def test_a_defect_names_its_kind_and_how_to_see_more(
    use: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hobbit-cpp", "llama.cpp", "patches"]
    assert all(len(line.split()) > 1 for line in lines)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    endless = (
        "import sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "from test_cli import FakeModel\n"
        "from hobbit_cpp.cli import main, run\n"
        "run.load_model = lambda args: FakeModel(['word '] * 1000000)\n"
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
    assert "note: Q4_K has blocks of 256, which do not divide rows of 96: Q4_0 instead" in err
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


# ---- a real model ----------------------------------------------------------------------------------------


def hobbit(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit_cpp", *args], capture_output=True, timeout=120, stdin=subprocess.DEVNULL
    )


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
        assert counts["selections"] == sum(
            counts[name] for name in ("hits_high", "hits_low", "loads_high", "loads_low", "skips")
        )
