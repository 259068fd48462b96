"""hobbit bench: names, order, medians, conditions, whole runs over tiny models. Nothing here is about how fast anything is."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest

from hobbit_cpp._memory import cgroup_limits
from hobbit_cpp.bench import conditions, runner
from hobbit_cpp.bench.contenders import DEFAULT_REGEX, Contender, parse_command, parse_contenders
from hobbit_cpp.bench.report import build_rows
from hobbit_cpp.bench.roof import add_roof
from hobbit_cpp.bench.runner import abba, budget_of, median_row
from hobbit_cpp.bench.sweep import draw, parse_sweep
from hobbit_cpp.bench.text import bundled_text, tokens_of
from hobbit_cpp.cli import main
from hobbit_cpp.errors import ParameterError
from models import tiny, tiny_dual

TOKENS, PROMPT = 8, 6
MEMORY = "120MiB"
QUICK = ["-t", "1", "--tokens", str(TOKENS), "--prompt-tokens", str(PROMPT), "-b", "64", "-ub", "64", "-q"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("hobbit_cpp.probe._DISK_SECONDS", 0.01)


# ---- who ----


def test_contenders_have_names_and_settings() -> None:
    mmap, usual, lru, exact, tuned = parse_contenders(
        "mmap, mmap-128,lru,exact,hobbit:prefetch_depth=0:norm_correction=off:low_share=0.1"
    )
    assert (mmap.kind, mmap.read_ahead) == ("stock", None) and usual.read_ahead == 128
    assert (lru.mode, exact.mode, exact.options) == ("lru", "hobbit", {"exact": True})
    assert tuned.options == {"prefetch_depth": 0, "norm_correction": False, "low_share": 0.1}
    resident, stock = parse_contenders("resident,none")
    assert not resident.capped and not stock.capped and mmap.capped and lru.capped


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no contenders"),
        ("Hobbit!", "is no contender"),
        ("hobbit,hobbit", "given twice"),
        ("mmap:prefetch_depth=0", "has no settings"),
        ("hobbit:depth=0", "is no setting"),
        ("hobbit:prefetch_depth=much", "is no value"),
        ("hobbit:precision_rule=best", "precision_rule must be"),
    ],
)
def test_a_wrong_contender_is_refused(text: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        parse_contenders(text)


@pytest.mark.parametrize("text", ["rival", "=true", "rival= "])
def test_a_command_has_a_name_and_a_command(text: str) -> None:
    with pytest.raises(ParameterError, match="write 'NAME=shell command'"):
        parse_command(text)


def test_a_regular_expression_needs_a_group() -> None:
    with pytest.raises(ParameterError, match="parentheses"):
        parse_command("rival=true", r"\d+ tok/s")
    with pytest.raises(ParameterError, match="command-regex"):
        parse_command("rival=true", "(")


@pytest.mark.parametrize(
    "line, rate",
    [
        ("eval time = 512.3 ms / 10 runs (51.23 ms per token, 19.52 tokens per second)", "19.52"),
        ("speed: 7.25 tok/s", "7.25"),
        ("| tg128 | 12 t/s", "12"),
        ("generated at 3.4 tokens/s", "3.4"),
    ],
)
def test_usual_ways_to_print_a_speed_are_found(line: str, rate: str) -> None:
    assert re.findall(DEFAULT_REGEX, line)[-1] == rate


# ---- in which order, and what is made of it ----


def test_rounds_go_there_and_back() -> None:
    a, b, c = (Contender(name, "offload") for name in "abc")
    assert ["".join(x.name for x in order) for order in abba([a, b, c], 4)] == ["abc", "cba", "abc", "cba"]


def run_of(name: str = "a", **more: Any) -> Dict[str, Any]:
    return {"contender": name, "kind": "offload", "memory": 1, "cap": "cgroup v1", "capped": True, "read_ahead": 128,
            "page_cache": "dropped", "notes": [], "tok_s": 1.0, **more}  # fmt: skip


def test_medians_and_the_worst_of_peaks() -> None:
    runs = [
        run_of(tok_s=x, peak_rss=p, within_budget=ok, slots_high=4)
        for x, p, ok in ((3.0, 10, True), (1.0, 30, False), (2.5, 20, True))
    ]
    row = median_row(runs)
    assert (row["tok_s"], row["tok_s_min"], row["tok_s_max"], row["peak_rss"]) == (2.5, 1.0, 3.0, 30)
    assert row["within_budget"] is False and row["slots_high"] == 4 and row["runs"] == 3


def test_a_failed_run_is_told() -> None:
    failed = {**run_of(), "error": "killed"}
    del failed["tok_s"]
    row = median_row([run_of(tok_s=2.0), failed])
    assert row["tok_s"] == 2.0 and row["failed"] == 1 and "1 of 2 runs failed: killed" in row["notes"]
    assert median_row([failed])["error"] == "killed"


def test_stock_that_is_refused_memory_for_repacked_weights_is_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = runner._call, []

    def call(command: Any, *rest: Any) -> Any:
        job = json.loads(Path(re.findall(r"\S+job\.json", str(command))[0].strip("'\"")).read_text(encoding="utf-8"))
        asked.append(job["repack"])
        if job["repack"]:
            return 1, "llama.cpp cannot load it: insufficient memory (attempted to allocate 24192.00 MB)"
        return real(command, *rest)

    monkeypatch.setattr(runner, "_call", call)
    path = tiny("mixtral", "Q8_0")
    setting = runner.Setting(path, path, list(range(5, 13)), 4, 64, 32, 32, 1, 60.0, files=(path,))
    row = runner.run_once(setting, parse_contenders("mmap")[0], None)
    assert asked == [True, False] and "error" not in row, row
    assert any("no memory for repacked weights" in note for note in row["notes"])


def test_the_roof_is_the_higher_of_cores_and_disk() -> None:
    row = run_of(tok_s=10.0, mb_token=60.0, mb_wasted_token=10.0, stall_ms=70.0)
    add_roof(row, floor_ms=20.0, bandwidth=1e9)
    assert (row["bound_ms"], row["bound_is"], row["bound_share"]) == (50.0, "disk", 0.5)
    assert row["spent_ms"] == {"compute": 20.0, "stall": 70.0, "other": 10.0}
    row = run_of(tok_s=10.0, mb_token=0.0, stall_ms=0.0)
    add_roof(row, floor_ms=20.0, bandwidth=1e9)
    assert (row["bound_ms"], row["bound_is"]) == (20.0, "cores") and row["spent_ms"]["other"] == 80.0
    row = run_of(tok_s=100.0, mb_token=0.0)
    add_roof(row, floor_ms=20.0, bandwidth=1e9)  # cannot be: told, not hidden
    assert row["bound_share"] == 2.0 and "faster than its bound" in row["notes"][0]
    row = run_of(disk_mb_token=200.0)  # stock llama.cpp: the kernel reads ahead, so it need not have read that much
    add_roof(row, floor_ms=20.0, bandwidth=1e9)
    assert "bound_ms" not in row and "spent_ms" not in row


def test_ratios_are_to_the_first_contender_or_there_are_none() -> None:
    def row(memory: int, name: str, tok_s: Optional[float]) -> Dict[str, Any]:
        return {"memory": memory, "contender": name, **({"error": "x"} if tok_s is None else {"tok_s": tok_s})}

    rows = build_rows([row(1, "a", 2.0), row(1, "b", 3.0), row(2, "a", None), row(2, "b", 3.0), row(2, "c", 6.0)])
    assert [r.get("ratio") for r in rows] == [1.0, 1.5, None, None, None]


def test_a_table_of_which_the_first_failed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from hobbit_cpp.bench.report import _print_speed

    good = {"memory": 1, "contender": "b", "tok_s": 3.0, "tok_s_min": 2.5, "tok_s_max": 3.5}
    _print_speed(build_rows([{"memory": 1, "contender": "a", "error": "x"}, good]), Console(width=180))
    out = capsys.readouterr().out
    assert "failed" in out and "3.00" in out


def test_a_table_that_cannot_be_printed_loses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(document: Any) -> None:
        raise RuntimeError("no table")

    monkeypatch.setattr("hobbit_cpp.bench.report.print_report", fails)
    argv = ["bench", str(tiny("mixtral")), "--against", "lru", "--sweep", "memory=120MiB..130MiB", *QUICK, "--rounds", "1"]
    out = ["--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "sweep")]
    assert main([*argv, *out]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["rows"] and (tmp_path / "sweep.csv").read_text().count("\n") > 1


# ---- under which conditions ----


def test_without_permission_there_is_no_cap_but_a_reason(tmp_path: Path) -> None:
    with conditions.memory_cgroup(1 << 20, root=tmp_path / "absent") as cap:
        assert cap.folder is None and cap.how.startswith("not capped: no memory cgroup may be made here")
        assert conditions.under_cgroup(["true"], cap) == ["true"] and cap.peak() is None
    with conditions.memory_cgroup(None) as cap:
        assert cap.how == "no cap"


def test_a_cgroup_of_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    with conditions.memory_cgroup(1 << 20, root=tmp_path) as cap:
        assert cap.how == "cgroup v2" and cap.folder is not None
        assert (cap.folder / "memory.max").read_text() == str(1 << 20)
        (cap.folder / "memory.peak").write_text("12345\n")
        (cap.folder / "memory.events").write_text("low 0\noom_kill 2\n")
        assert cap.peak() == 12345 and cap.kills() == 2
        for file in cap.folder.iterdir():
            file.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["cgroup.subtree_control"]


def test_a_cap_holds_for_the_child(tmp_path: Path) -> None:
    with conditions.memory_cgroup(64 << 20) as cap:
        if cap.folder is None:
            pytest.skip(cap.how)
        program = "x = bytearray(200 << 20)"
        code, _ = runner._call(conditions.under_cgroup([sys.executable, "-c", program], cap), 60)
        assert code == -9 and cap.kills() >= 1
        assert (cap.peak() or 0) <= 64 << 20
        assert not any(limit.path == cap.folder for limit in cgroup_limits())  # we ourselves are not in it
    assert not cap.folder.exists()


def test_read_ahead_comes_back() -> None:
    path = tiny("mixtral")
    before = conditions.get_read_ahead(path)
    with conditions.read_ahead(path, 64) as why_not:
        if why_not is not None:
            assert conditions.get_read_ahead(path) == before
            pytest.skip(why_not)
        assert conditions.get_read_ahead(path) == 64
    assert conditions.get_read_ahead(path) == before


def test_caches_are_dropped_somehow() -> None:
    assert "page cache" in conditions.drop_caches([tiny("mixtral")])


# ---- over which text ----


def test_all_contenders_get_the_same_tokens(tmp_path: Path) -> None:
    assert len(bundled_text()) > 100_000
    first = tokens_of(tiny("mixtral"), 500, None)
    assert len(first.ids) == 500 and first == tokens_of(tiny("mixtral"), 500, None)
    text = tmp_path / "short.txt"
    text.write_text("the token")
    assert tokens_of(tiny("mixtral"), 3, text).source == "short.txt"
    with pytest.raises(ParameterError, match=r"short.txt has \d+ tokens, 500 are needed"):
        tokens_of(tiny("mixtral"), 500, text)


def test_sweeps() -> None:
    assert parse_sweep("memory=10%..100%:4", 1000) == [100, 400, 700, 1000]
    assert len(parse_sweep("memory=1GiB..4GiB", 1)) == 6
    assert parse_sweep("memory=12.5%..25%:2", 1000) == [125, 250]
    for text in ("memory=10%", "speed=1..2", "memory=50%..10%", "memory=1..9:1"):
        with pytest.raises(ParameterError, match="--sweep"):
            parse_sweep(text, 1000)


# ---- whole runs ----


def bench(tmp_path: Path, *arguments: str, code: int = 0) -> Dict[str, Any]:
    out = tmp_path / "bench.json"
    assert main(["bench", *QUICK, *arguments, "--json", str(out)]) == code
    document: Dict[str, Any] = json.loads(out.read_text())
    return document


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = bench(
        tmp_path, str(tiny_dual("mixtral")), "--against", "mmap,exact,hobbit,lru:io_threads=2", "--memory", MEMORY,
        "--rounds", "2", "--command", "rival=echo '{tokens} tokens at 4.5 tok/s'",
    )  # fmt: skip
    assert set(document) == {
        "format", "command", "started", "versions", "model", "conditions", "disk", "floor", "interrupted", "rows", "runs",
    }  # fmt: skip
    rows = {row["contender"]: row for row in document["rows"]}
    assert not any("error" in row for row in rows.values())
    order = document["conditions"]["order"]
    assert [run["contender"] for run in document["runs"]] == order[0] + order[1] and order[1] == order[0][::-1]
    assert all(row["runs"] == 2 and row["memory"] == 120 << 20 for row in rows.values())
    exact, hobbit, mmap, rival = rows["exact"], rows["hobbit"], rows["mmap"], rows["rival"]
    for row in (exact, hobbit):
        assert row["n_tokens"] == TOKENS and row["tok_s"] > 0 and row["prompt_tok_s"] > 0
        assert row["within_budget"] and row["peak_rss"] <= row["memory_budget"] == budget_of(120 << 20)
        assert abs(row["share_high"] + row["share_low"] + row["share_skipped"] - 1) < 1e-6
        assert abs(sum(row["spent_ms"].values()) - row["token_ms"]) < 1e-6
        assert 0 < row["plan"]["tok_s_low"] <= row["plan"]["tok_s"] <= row["plan"]["tok_s_high"]
        assert row["bound_share"] > 0
    # the same tokens through the same weights
    assert exact["perplexity"] == pytest.approx(mmap["perplexity"], rel=1e-5)
    assert mmap["ratio"] == 1 and rival["tok_s"] == 4.5 and "perplexity" not in rival
    assert document["floor"]["source"] == "measured" and document["conditions"]["start"] == "cold"
    out = capsys.readouterr().out
    for word in ("GB/s in reads of", "exact", "rival", "of bound", "pydoc topics"):
        assert word in out


def test_what_fails_says_why_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = bench(
        tmp_path, str(tiny_dual("mixtral")), "--against", "hobbit", "--memory", f"40MiB,{MEMORY}", "--rounds", "2",
        "--command", "broken=echo before; echo the reason >&2; exit 3", "--command", "silent=echo nothing",
    )  # fmt: skip
    rows = {(row["contender"], row["memory"] >> 20): row for row in document["rows"]}
    assert "is too small for" in rows["hobbit", 40]["error"] and "error" not in rows["hobbit", 120]
    assert rows["broken", 120]["error"] == "the reason" and "no match" in rows["silent", 120]["error"]
    failed = [run for run in document["runs"] if "error" in run]
    assert len(failed) == 5  # what failed once is not asked again
    assert "hobbit: failed: a memory budget of" in capsys.readouterr().out


def test_a_run_that_was_cut_short_has_no_perplexity(tmp_path: Path) -> None:
    document = bench(
        tmp_path, str(tiny("mixtral")), "--against", "exact", "--memory", MEMORY, "--rounds", "1", "--patience", "1e-9",
    )  # fmt: skip
    row = document["rows"][0]
    assert row["n_tokens"] == 1 and "perplexity" not in row and "slower than --patience" in row["notes"][0]


@pytest.mark.parametrize("stop,code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["Ctrl-C", "SIGTERM"])
def test_what_was_finished_before_it_was_ended_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    once, names = runner.run_once, []

    def interrupted(setting: Any, contender: Contender, memory: Any) -> Dict[str, Any]:
        names.append(contender.name)
        if len(names) == 2:
            raise stop
        return once(setting, contender, memory)

    monkeypatch.setattr(runner, "run_once", interrupted)
    document = bench(
        tmp_path, str(tiny("mixtral")), "--against", "exact,lru", "--memory", MEMORY, "--rounds", "2", code=code
    )  # fmt: skip
    assert names == ["exact", "lru"] and [row["contender"] for row in document["rows"]] == ["exact"]
    assert document["rows"][0]["tok_s"] > 0 and len(document["runs"]) == 1


def test_warm_runs_and_runs_without_a_prompt(tmp_path: Path) -> None:
    document = bench(
        tmp_path, str(tiny("mixtral", "Q8_0")), "--against", "exact,resident", "--memory", MEMORY, "--rounds", "1", "--warm",
        "--prompt-tokens", "0",
    )  # fmt: skip
    cold = bench(
        tmp_path, str(tiny("mixtral", "Q8_0")), "--against", "exact", "--memory", MEMORY, "--rounds", "1", "--prompt-tokens", "0",
    )  # fmt: skip
    for row in document["rows"]:
        assert row["hit_rate"] > cold["rows"][0]["hit_rate"] + 0.1
        assert "prompt_tok_s" not in row and row["first_token_s"] > 0
    assert document["rows"][1]["cap"] == "no cap" and document["conditions"]["start"] == "warm"


def test_a_sweep_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    document = bench(
        tmp_path, str(tiny_dual("mixtral")), "--against", "exact,hobbit", "--sweep", "memory=110MiB..130MiB:2", "--rounds", "1",
        "--out", str(tmp_path / "sweep"),
    )  # fmt: skip
    assert [row["memory"] >> 20 for row in document["rows"]] == [110, 110, 130, 130]
    with open(tmp_path / "sweep.csv", newline="") as f:
        lines: List[Dict[str, str]] = list(csv.DictReader(f))
    assert [line["contender"] for line in lines] == ["exact", "hobbit"] * 2
    assert all(float(line["tok_s"]) > 0 and float(line["perplexity"]) > 0 for line in lines)
    picture = (tmp_path / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.parametrize("n_experts, k", [(8, 2), (16, 4)])
def test_routing_of_a_trace_is_followed(n_experts: int, k: int, tmp_path: Path) -> None:
    ids = np.broadcast_to(np.arange(k, dtype=np.uint8), (20, 4, k))  # every token as the one before
    np.savez(
        tmp_path / "same.npz", ids=ids, weights=np.full(ids.shape, 1 / k, np.float16), lens=np.array([20], np.int32),
        n_experts=np.int32(n_experts), meta=json.dumps({"model": "none"}),
    )  # fmt: skip
    document = bench(
        tmp_path, str(tiny("mixtral", "Q8_0")), "--against", "exact,mmap", "--memory", MEMORY, "--rounds", "1",
        "--prompt-tokens", "0", "--routing", str(tmp_path / "same.npz"),
    )  # fmt: skip
    exact = document["rows"][0]
    # what the first token loads is all that is ever needed
    assert exact["loads_high"] == pytest.approx(1 / TOKENS)
    assert any("made to fit 2 of 8" in note for note in exact["notes"]) is (k != 2)
    assert document["conditions"]["routing"] == "same.npz"


def test_rows_without_figures_are_left_out_of_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [run_of(tok_s=1.0, tok_s_min=0.9, tok_s_max=1.1), {**run_of("b"), "error": "killed", "tok_s": None}]
    draw(tmp_path / "x.png", rows, "title", "subtitle")
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "150%"], "more than the whole"),
        (["--text", "/absent.txt"], "no such file"),
        (["--json", "/absent/x.json"], "cannot be written"),
        (["--command-regex", "(x)"], "needs --command"),
        (["--json", "/"], "it is a folder"),
        (["--command", "exact=true"], "choose another"),
        (["--against", "hobbit,klotski"], "--against klotski: unknown mode 'klotski'; there are: hobbit, fate, lru"),
        (["--against", "hobbit:low_share=5"], "--against hobbit:low_share=5: "),
        (["--routing", __file__], "is not a trace"),
        (["-c", "8"], "too small for"),
    ],
)
def test_wrong_usage_is_one_line(arguments: List[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny("mixtral")), "-q", *arguments]) == 1
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_stall_is_no_longer_than_a_token() -> None:
    row: Dict[str, Any] = {"tok_s": 10.0, "mb_token": 1.0, "stall_ms": 130.0}
    add_roof(row, floor_ms=20.0, bandwidth=1e9)
    assert row["spent_ms"] == {"compute": 0.0, "stall": 100.0, "other": 0.0}
