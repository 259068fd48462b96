"""hobbit report: what is read, what the page has and has not, and the arithmetic behind the pictures."""

from __future__ import annotations

import html.parser
import json
import random
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import pytest

from decode import load, words
from hobbit_cpp import Llama, OffloadParams, ParameterError, StateError
from hobbit_cpp._recording import EVENT_KINDS, MemorySamples, reuse_distances
from hobbit_cpp.cli import main
from hobbit_cpp.report import page, read
from hobbit_cpp.report.over_time import Token
from hobbit_cpp.report.svg import ticks
from models import tiny_dual

Captured = pytest.CaptureFixture[str]
quiet = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

SECTIONS = ["experts", "hits", "reuse", "precision", "timeline", "memory"]


# ---- documents -------------------------------------------------------------------------------------------------------


def counts(random_: random.Random, n: int = 1000) -> Dict[str, Any]:
    high, low, loads, low_loads = (random_.randrange(n // 5) for _ in range(4))
    return {
        "selections": n, "hits_high": high, "hits_low": low, "loads_high": loads, "loads_low": low_loads,
        "skips": n - high - low - loads - low_loads, "mass_total": n / 2, "mass_low": 10.0, "mass_skipped": 1.0,
        "bytes_demand": 10**7, "bytes_prefetch": 10**6, "stall_seconds": 0.1, "hit_rate": (high + low) / n,
        "bytes_per_token": 1e6, "memory_budget": 1 << 30,
    }  # fmt: skip


def run_document(model: str = "/models/m.gguf", n_layers: int = 5, n_experts: int = 8, record: bool = True) -> Dict[str, Any]:
    r = random.Random(1)
    stats = {**counts(r), "layers": [{**counts(r), "block": i + 1} for i in range(n_layers)]}
    uses = [[r.randrange(50) for _ in range(n_experts)] for _ in range(n_layers)]
    out: Dict[str, Any] = {
        "model": model,
        "prompt": {"tokens": 7, "tokens_per_second": 20.0, "offload": stats},
        "decode": {"tokens": 30, "tokens_per_second": 10.0, "offload": stats},
        "peak_memory": 900 << 20,
        "experts": {"blocks": list(range(1, n_layers + 1)), "uses": uses, "loads": uses},
    }
    if record:
        events: List[List[Any]] = [["decode", 0, 0.0, 0.03, 0]]
        for i in range(n_layers):
            t = 0.005 * i
            events += [["route", i + 1, t + 0.001, t + 0.0012, 0], ["experts", i + 1, t + 0.002, t + 0.004, 0]]
            events += [["stall", i + 1, t + 0.002, t + 0.003, 0], ["read", i + 1, t + 0.0012, t + 0.003, 500_000]]
        out["recording"] = {
            "timeline": {"last": events, "slowest": [["decode", 0, 0.0, 0.04, 0], *events[1:]]},
            "memory": [[0.1 * i, (800 + i) << 20] for i in range(20)],
            "reuse": {"tokens": 37, "experts": n_experts, "counts": [[3] * (n_experts + 1)] * n_layers},
        }
    return out


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def write_trace(path: Path, **more: Any) -> Path:
    ids = np.random.default_rng(0).random((50, 3, 16)).argsort(-1)[..., :2].astype(np.uint8)
    arrays = {
        "ids": ids, "weights": np.ones(ids.shape, np.float16), "lens": np.array([20, 30], np.int32), "n_experts": np.int32(16),
        "meta": np.array(json.dumps({"model": "traced"})), **more,
    }  # fmt: skip
    np.savez(path, **arrays)
    return path


class Elements(html.parser.HTMLParser):
    """Tags that do not close, ids, addresses, texts."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: List[str] = []
        self.ids: List[str] = []
        self.addresses: List[str] = []
        self.tags: List[str] = []
        self.text: List[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(text: str) -> Elements:
    found = Elements(text)
    assert not found.open
    assert all(a.startswith("#") for a in found.addresses) and "@import" not in text and "url(" not in text
    assert not re.search(r"https?://", text)
    assert "nan" not in re.sub(r"<script.*?</script>", "", text).lower().replace("mnat", "").split()
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_recorded_run_has_every_section_drawn(tmp_path: Path) -> None:
    found = check_page(page(read([write(tmp_path / "run.json", run_document())])))
    assert [i for i in found.ids if i in SECTIONS] == SECTIONS
    text = " ".join(found.text)
    assert "Not in the input" not in text
    for words_ in (
        "layer (N of blk.N)",
        "hit rate (%)",
        "time since the token began (ms)",
        "memory held (MiB)",
        "budget 1,024 MiB",
    ):
        assert words_ in text
    assert found.tags.count("table") >= 5


def test_what_is_missing_is_said_and_how_to_get_it(tmp_path: Path) -> None:
    text = page(read([write(tmp_path / "run.json", run_document(record=False))]))
    assert text.count("Not in the input") == 3 and "hobbit run --record" in text
    check_page(text)
    text = page(read([write_trace(tmp_path / "t.npz")]))
    assert text.count("Not in the input") == 4
    check_page(text)


def test_several_files_make_one_page(tmp_path: Path) -> None:
    files = [write_trace(tmp_path / "t.npz"), write(tmp_path / "run.json", run_document(record=False))]
    data = read(files)
    assert data.reuse is not None and data.layers is not None and data.reuse_tokens == 50
    assert page(data).count("Not in the input") == 2


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>&\"'"
    document = run_document(model=f"/models/{evil.replace('/', '')}.gguf")
    bench = {"model": evil, "rows": [{"contender": evil, "memory": None, "tok_s": 1.0}]}
    text = page(read([write(tmp_path / "run<b>.json", document), write(tmp_path / "b.json", bench)]))
    assert "run<b>" not in text
    assert "<script>alert" not in text and text.count("<script") == 2
    check_page(text)


@pytest.mark.parametrize(("n_layers", "n_experts"), [(1, 1), (1, 2), (61, 256)])
def test_any_size_is_drawn(tmp_path: Path, n_layers: int, n_experts: int) -> None:
    text = page(read([write(tmp_path / "run.json", run_document(n_layers=n_layers, n_experts=n_experts))]))
    check_page(text)
    assert len(text) < 3_000_000


def test_a_layer_without_selections_is_drawn(tmp_path: Path) -> None:
    document = run_document()
    document["experts"]["uses"][0] = [0] * 8
    for key, value in document["decode"]["offload"]["layers"][0].items():
        document["decode"]["offload"]["layers"][0][key] = value if key == "block" else 0
    document["recording"]["reuse"]["counts"][0] = [0] * 9
    check_page(page(read([write(tmp_path / "run.json", document)])))
    document["recording"]["reuse"]["counts"] = [[0] * 9 for _ in document["recording"]["reuse"]["counts"]]
    check_page(page(read([write(tmp_path / "run.json", document)])))


def test_bench_and_eval_documents_are_drawn(tmp_path: Path) -> None:
    bench = {
        "model": {"name": "m", "path": "m.gguf"},
        "rows": [
            {"contender": "hobbit", "memory": 1 << 30, "tok_s": 19.0, "mb_token": 70.0, "hit_rate": 0.5},
            {"contender": "mmap", "memory": 1 << 30, "tok_s": 5.0},
            {"contender": "gone", "memory": None, "error": "x"},
        ],
    }
    found = check_page(page(read([write(tmp_path / "b.json", bench)])))
    assert "contenders" in found.ids and "all, gone: failed: x" in found.text

    def figure(x: float) -> Dict[str, Any]:
        return {"value": x, "low": 0.9 * x, "high": 1.1 * x}

    setting = {
        "name": "low", "offload": {"mb_per_token": 70.0}, "text": {"perplexity": figure(20.0), "kl": figure(0.01)},
    }  # fmt: skip
    document = {"model": "m.gguf", "conditions": {}, "settings": [setting, {"name": "stock", "offload": None, "text": None}]}
    found = check_page(page(read([write(tmp_path / "e.json", document)])))
    assert "settings" in found.ids and "20.00 [18.00, 22.00]" in found.text
    answered = {"name": "exact", "offload": {"mb_per_token": 70.0}, "text": None, "questions": {"acc": figure(0.4)}}
    found = check_page(page(read([write(tmp_path / "q.json", {**document, "settings": [answered]})])))
    assert "40.00 [36.00, 44.00]" in found.text  # of questions alone
    gone = {"model": "m.gguf", "rows": [{"contender": "gone", "memory": None, "error": "x"}]}
    assert "all, gone: failed: x" in check_page(page(read([write(tmp_path / "g.json", gone)]))).text


def test_what_is_missing_comes_last(tmp_path: Path) -> None:
    bench = {"model": "m.gguf", "rows": [{"contender": "hobbit", "memory": 1 << 30, "tok_s": 19.0}]}
    text = page(read([write(tmp_path / "b.json", bench)]))
    assert text.index('id="contenders"') < text.index('id="experts"')


def test_samples_of_a_long_test(tmp_path: Path) -> None:
    path = tmp_path / "soak.csv"
    path.write_text("seconds,action,resident,budget\n0,a,100e6,200e6\n5,b,150e6,200e6\n9,c,160e6,120e6\n", encoding="utf-8")
    text = page(read([path]))
    assert "in 3 samples, 1 of them above the budget" in text and text.count("Not in the input") == 5
    check_page(text)
    for bad in ("", "seconds\n1\n", "seconds,resident\n1,x\n"):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(ParameterError, match=r"soak\.csv"):
            read([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a file that can be drawn"),
        (b"[1]", "not a file"),
        (b'{"prompt":{"tokens":0},"decode":{}}', "damaged"),
        (b"\xff\x00", "not a file"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, capsys: Captured, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "r.html").exists()


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    source, out = write(tmp_path / "run.json", run_document()), tmp_path / "r.html"
    assert main(["report", str(source), "-o", str(out)]) == 0
    check_page(out.read_text(encoding="utf-8"))
    assert main(["report", str(source), "-o", str(source)]) == 1
    assert main(["report", str(tmp_path / "none.json"), "-o", str(out)]) == 1
    assert main(["report", str(write_trace(tmp_path / "bad.npz", n_experts=np.int32(2))), "-o", str(out)]) == 1
    assert "no such file" in capsys.readouterr().err


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_reuse_distances_are_those_of_an_lru_stack() -> None:
    rng = np.random.default_rng(5)
    n_experts, k = 9, 3
    ids = np.stack([np.stack([rng.permutation(n_experts)[:k] for _ in range(2)]) for _ in range(80)])
    got = reuse_distances(ids, n_experts)
    for layer in range(2):
        stack: List[int] = []
        want = np.zeros(n_experts + 1, int)
        for expert in ids[:, layer].ravel().tolist():
            if expert in stack:
                want[stack.index(expert)] += 1
                stack.remove(expert)
            else:
                want[n_experts] += 1
            stack.insert(0, expert)
        assert got[layer].tolist() == want.tolist()


def test_rows_that_are_not_there_do_not_count() -> None:
    ids = np.array([[[1, 2]], [[0, 0]], [[1, 3]]])
    known = np.array([[True], [False], [True]])[:, :, None].repeat(2, 2)
    assert reuse_distances(ids, 4, known).tolist() == [[0, 1, 0, 0, 3]]


def test_what_fills_the_rows_of_layers_that_select_fewer_does_not_count() -> None:
    ids = np.array([[[2, 0, 1]], [[3, 0, 1]], [[2, 0, 1]]])
    known = np.array([[[True, False, False]]]).repeat(3, 0)
    assert reuse_distances(ids, 4, known).tolist() == [[0, 1, 0, 0, 2]]
    some = np.array([[[True, True, False]], [[True, False, True]], [[True, True, False]]])
    # 2 0, 3 1, 2 0: both are used again with three others between
    assert reuse_distances(ids, 4, some).tolist() == [[0, 0, 0, 2, 4]]


def test_a_token_is_taken_apart() -> None:
    token = Token(run_document(n_layers=2)["recording"]["timeline"]["last"])
    assert token.total == pytest.approx(30) and token.blocks == [1, 2]
    assert token.sums("experts") == pytest.approx(4) and token.sums("stall") == pytest.approx(2)
    # before the first router 1 ms, from the end of the first layer's experts (4 ms) to the second router (6 ms)
    assert token.sum("dense", 1) == pytest.approx(1) and token.sum("dense", 2) == pytest.approx(2)
    np.testing.assert_allclose(token.rest, (9, 30))
    assert token.bytes["read"] == 1_000_000


def test_ticks_are_round() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100] or ticks(0, 100, 5) == [0, 25, 50, 75, 100]
    assert ticks(0, 0, 5) == [0] and len(ticks(0, 0.00123, 6)) >= 3
    assert all(len(ticks(0, x, 6)) <= 7 for x in (1, 3.7, 12, 99, 12345.6))


def test_memory_samples_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0, 1e6, 0.06).tolist())
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    memory = MemorySamples()
    for _ in range(20_000):
        memory.take()
    assert 500 < len(memory.samples) < 2000
    assert memory.samples[0][0] < 1 and memory.samples[-1][0] > 1150


# ---- a real run ------------------------------------------------------------------------------------------------------


@quiet
def test_recording_a_tiny_model() -> None:
    path = tiny_dual("deepseek2")
    params = OffloadParams(t1=0.3, t2=0.6, expert_cache="30%")
    llm = load(Llama, str(path), 1, offload=params)
    with pytest.raises(StateError):
        llm.recording()
    tokens = words(llm, 24)
    llm.start_recording()
    llm.eval(tokens[:8])
    assert llm.recording()["timeline"] == {"last": [], "slowest": []}  # a batch is no token
    for token in tokens[8:]:
        llm.eval([token])
    recorded, stats, experts = llm.recording(), llm.offload_stats(), llm.expert_uses()
    blocks = [layer.block for layer in stats.layers]
    assert experts["blocks"] == blocks == [1, 2, 3]
    assert [sum(row) for row in experts["uses"]] == [layer.selections for layer in stats.layers]
    assert [sum(row) for row in experts["loads"]] == [layer.loads_high + layer.loads_low for layer in stats.layers]
    for events in recorded["timeline"].values():
        kinds = {kind for kind, *_ in events}
        assert {"decode", "route", "experts"} <= kinds <= set(EVENT_KINDS)
        whole = next(e for e in events if e[0] == "decode")
        assert all(0 <= begin <= end <= whole[3] + 1e-6 for _, _, begin, end, _ in events)
        assert {block for kind, block, *_ in events if kind == "experts"} == set(blocks)
        assert all(size > 0 for kind, _, _, _, size in events if kind == "read")
    seconds = {which: next(e[3] for e in events if e[0] == "decode") for which, events in recorded["timeline"].items()}
    assert seconds["slowest"] >= seconds["last"]
    assert recorded["memory"] and recorded["memory"][0][1] > 1 << 20
    reuse = np.array(recorded["reuse"]["counts"])
    assert reuse.sum() == stats.selections and recorded["reuse"]["tokens"] == 24
    llm.reset_offload_stats()
    assert not np.any(llm.expert_uses()["uses"])
    llm.close()


@quiet
def test_run_records_what_report_draws(tmp_path: Path, capsys: Captured) -> None:
    stats, out = tmp_path / "stats.json", tmp_path / "r.html"
    model = str(tiny_dual("mixtral"))
    args = ["run", model, "-p", "the expert of", "-n", "12", "-c", "64", "-t", "1", "-tb", "1", "--temp", "0"]
    assert main([*args, "--expert-cache", "40%", "--record"]) == 1
    assert "--json-stats" in capsys.readouterr().err
    assert main([*args, "--expert-cache", "40%", "--record", "--json-stats", str(stats)]) == 0
    assert main(["report", str(stats), "-o", str(out)]) == 0
    assert "Not in the input" not in out.read_text(encoding="utf-8")
    check_page(out.read_text(encoding="utf-8"))
