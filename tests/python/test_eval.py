"""hobbit eval: the statistics against figures worked out by hand, the procedure on made-up models, and a tiny real one."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from decode import load, logits
from hobbit_cpp import Llama, OffloadParams, ParameterError
from hobbit_cpp._handle import ModelInfo
from hobbit_cpp.cli import main
from hobbit_cpp.evaluate import questions as q
from hobbit_cpp.evaluate import statistics as st
from hobbit_cpp.evaluate import table
from hobbit_cpp.evaluate import text as t
from hobbit_cpp.evaluate.compare import Plan, run
from hobbit_cpp.evaluate.scorer import LlamaScorer
from hobbit_cpp.evaluate.settings import exact_setting, kind_of, parse_setting
from hobbit_cpp.evaluate.tuning import tune_fraction, tune_whole
from hobbit_cpp.stats import OffloadStats
from models import tiny, tiny_dual

quiet = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
Captured = pytest.CaptureFixture[str]

VOCABULARY = 256


class FakeScorer:
    """One token a byte; `predict(context)` gives the logits of what comes next."""

    vocabulary = VOCABULARY

    def __init__(self, predict: Callable[[List[int]], Any], can_rewind: bool = True, bytes_per_token: int = 0) -> None:
        self.predict, self.can_rewind, self.bytes_per_token = predict, can_rewind, bytes_per_token
        self.context: List[int] = []
        self.fed: List[int] = []  # widths
        self.n = 0
        self.closed = False

    def words(self, text: str, begin: bool) -> List[int]:
        return ([0] if begin else []) + list(text.encode())

    def restart(self) -> None:
        self.context = []

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        rows = []
        for token in tokens:
            self.context.append(token)
            rows.append(np.asarray(self.predict(self.context), np.float32))
        self.fed.append(len(tokens))
        self.n += len(tokens)
        return np.stack(rows)

    def rewind(self, n: int) -> bool:
        if self.can_rewind:
            del self.context[n:]
        return self.can_rewind

    def counts(self) -> Optional[OffloadStats]:
        return OffloadStats(n_tokens=self.n, bytes_demand=self.n * self.bytes_per_token, selections=self.n, pool_bytes=1)

    def forget_counts(self) -> None:
        self.n = 0

    def close(self) -> None:
        self.closed = True


def made_up_info(**known: int) -> ModelInfo:
    return ModelInfo(**{**{field.name: 0 for field in fields(ModelInfo)}, "has_low": True, "direct_io": True, **known})  # type: ignore[arg-type]


class Silence:
    def phase(self, name: str, total: int) -> None:
        pass

    def step(self, n: int) -> None:
        pass


def uniform(_: List[int]) -> Any:
    return np.zeros(VOCABULARY)


def text_file(tmp_path: Path, n: int = 3000) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(("the quick brown fox " * n)[:n], encoding="utf-8")
    return path


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_log_softmax_and_divergence_by_hand() -> None:
    log_p = st.log_softmax(np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)) + 7)
    np.testing.assert_allclose(np.exp(log_p), [[0.5, 0.5], [0.9, 0.1]], rtol=1e-6)
    want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    np.testing.assert_allclose(st.kl_divergence(log_p[0], log_p[1]), want, rtol=1e-6)
    assert st.kl_divergence(log_p[0], log_p[0]) == 0
    # what cannot happen under p adds nothing, whatever q says
    certain = np.array([0.0, -np.inf])
    np.testing.assert_allclose(st.kl_divergence(certain, log_p[0]), math.log(2), rtol=1e-6)


def test_wilson_by_hand() -> None:
    e = st.wilson(8, 10)
    assert (e.value, round(e.low, 4), round(e.high, 4)) == (0.8, 0.4902, 0.9433)
    assert st.wilson(0, 10).low == 0 and round(st.wilson(0, 10).high, 4) == 0.2775
    assert st.wilson(10, 10).high == pytest.approx(1) and st.wilson(10, 10).high <= 1
    assert math.isnan(st.wilson(0, 0).value)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        e = st.mean_of_blocks(rng.exponential(2.0, 400))
        inside += e.low <= 2.0 <= e.high
    assert 0.88 <= inside / 200 <= 0.99


def test_neighbours_that_are_alike_make_intervals_wider() -> None:
    rng = np.random.default_rng(2)
    apart = rng.standard_normal(4000)
    alike = np.repeat(rng.standard_normal(250), 16)
    a, b = st.mean_of_blocks(apart), st.mean_of_blocks(alike)
    assert b.high - b.low > 2 * (a.high - a.low)


def test_blocks_do_not_cross_windows() -> None:
    groups = np.repeat([0, 1, 2], [50, 7, 4000])
    starts = st.block_starts(groups)
    assert {0, 50, 57} <= set(starts.tolist())
    assert max(np.diff(starts)) <= 32


def test_a_single_value_has_no_interval() -> None:
    assert st.mean_of_blocks(np.array([2.0])).value == 2 and math.isnan(st.mean_of_blocks(np.array([2.0])).low)
    assert math.isnan(st.mean_of_blocks(np.array([])).value)


def test_quantile() -> None:
    e = st.quantile_of_blocks(np.arange(1000.0), 0.95, np.zeros(1000, np.int64))
    assert e.value == pytest.approx(949.05) and e.low <= e.value <= e.high


# ---- text ------------------------------------------------------------------------------------------------------------


def passage(n: int = 100, window: int = 20, skip: int = 0, warmup: int = 10, path: Optional[Path] = None) -> t.Passage:
    assert path is not None
    return t.read_passage(FakeScorer(uniform), path, n, warmup, window, skip)


@pytest.mark.parametrize(("n", "window", "skip"), [(100, 20, 0), (100, 20, 9), (1, 2, 0), (19, 20, 0), (20, 20, 18)])
def test_windows_score_as_many_tokens_as_asked_for(tmp_path: Path, n: int, window: int, skip: int) -> None:
    p = passage(n, window, skip, path=text_file(tmp_path)) if skip < window - 1 else None
    if p is None:
        with pytest.raises(ParameterError, match="nothing is left"):
            passage(n, window, skip, path=text_file(tmp_path))
        return
    assert p.n_scored == n == sum(len(w) - 1 - skip for w in p.windows)
    assert all(len(w) <= window and w[0] == 0 for w in p.windows)
    text = text_file(tmp_path).read_bytes()
    assert bytes(p.warmup + [token for w in p.windows for token in w[1:]]) == text[: 10 + sum(len(w) - 1 for w in p.windows)]


@pytest.mark.parametrize(("n", "window", "skip"), [(100, 20, 0), (100, 20, 9), (1, 2, 0), (19, 20, 0), (38, 20, 0), (90, 20, 9)])
def test_the_end_of_a_text(tmp_path: Path, n: int, window: int, skip: int) -> None:
    path = text_file(tmp_path)
    end, beginning = (t.read_passage(FakeScorer(uniform), path, n, 10, window, skip, from_end=x) for x in (True, False))
    used = bytes(end.warmup + [token for w in end.windows for token in w[1:]])
    assert path.read_bytes().endswith(used) and end.n_scored == n
    assert [len(w) for w in end.windows] == [len(w) for w in beginning.windows]
    with pytest.raises(ParameterError, match="50 tokens, too few for 100 scored ones after 10"):
        t.read_passage(FakeScorer(uniform), text_file(tmp_path, 50), 100, 10, 20, 0, from_end=True)


@pytest.mark.parametrize("from_end", [False, True])
def test_a_text_may_come_from_a_pipe(tmp_path: Path, from_end: bool) -> None:
    path, pipe = text_file(tmp_path), tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(lambda: pipe.write_bytes(path.read_bytes()))
        piped = t.read_passage(FakeScorer(uniform), pipe, 100, 10, 20, 0, from_end=from_end)
        written.result(10)
    assert piped == t.read_passage(FakeScorer(uniform), path, 100, 10, 20, 0, from_end=from_end)


def test_a_text_that_is_too_short_says_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="50 tokens, too few for 100 scored ones after 10"):
        passage(100, 20, path=text_file(tmp_path, 50))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ParameterError, match=r"empty\.txt is empty"):
        passage(path=tmp_path / "empty.txt")


@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_uniform_model_has_the_size_of_the_vocabulary_as_perplexity(tmp_path: Path, width: int) -> None:
    model = FakeScorer(uniform)
    scores = t.score_text(model, passage(path=text_file(tmp_path)), width, lambda n: None)
    perplexity = t.summarise(scores, scores)["perplexity"]
    assert perplexity.value == pytest.approx(VOCABULARY) and perplexity.low == pytest.approx(VOCABULARY)
    assert max(model.fed) == min(width, 19)


def test_a_model_that_knows_what_comes_has_perplexity_one(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    text = path.read_bytes()

    def oracle(context: List[int]) -> Any:
        row = np.zeros(VOCABULARY)
        at = text.find(bytes(context[1:])) + len(context) - 1 if len(context) > 1 else None
        row[text[at] if at is not None else text[10]] = 50.0
        return row

    p = replace(passage(15, 20, path=path), warmup=[])
    scores = t.score_text(FakeScorer(oracle), p, 1, lambda n: None)
    assert t.summarise(scores, None)["perplexity"].value == pytest.approx(1, abs=1e-6)


def test_exact_against_itself_is_zero_and_another_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    table = 3 * rng.standard_normal((VOCABULARY, VOCABULARY))
    other = table + 0.1 * rng.standard_normal(table.shape)
    p = passage(300, 50, path=text_file(tmp_path))
    kept = t.LogProbs(tmp_path)
    exact = t.score_text(FakeScorer(lambda c: table[c[-1]]), p, 1, lambda n: None, keep=kept)
    same = t.score_text(FakeScorer(lambda c: table[c[-1]]), p, 1, lambda n: None, against=kept)
    figures = t.summarise(same, exact)
    assert figures["loss"].value == 0 and figures["loss"].high == 0
    assert figures["kl"].value < 2e-6 and figures["top1_agreement"].value == 1
    lossy = t.score_text(FakeScorer(lambda c: other[c[-1]]), p, 1, lambda n: None, against=kept)
    kept.close()
    figures = t.summarise(lossy, exact)
    given = [w[i] for w in p.windows for i in range(len(w) - 1)]
    came = [w[i + 1] for w in p.windows for i in range(len(w) - 1)]
    log_p, log_q = st.log_softmax(table.astype(np.float32)), st.log_softmax(other.astype(np.float32))
    assert figures["kl"].value == pytest.approx(st.kl_divergence(log_p[given], log_q[given]).mean(), rel=0.01)
    assert figures["loss"].value == pytest.approx((log_p[given, came] - log_q[given, came]).mean(), abs=1e-9)
    assert figures["top1_agreement"].value == np.mean(log_p[given].argmax(1) == log_q[given].argmax(1))
    assert figures["perplexity_change"].value == pytest.approx(
        figures["perplexity"].value / t.summarise(exact, None)["perplexity"].value - 1
    )


# ---- questions -------------------------------------------------------------------------------------------------------

HUB = {"id": "1", "question": "Q?", "choices": {"text": ["no", "yes, it is"], "label": ["1", "2"]}, "answerKey": "2"}
AI2 = {
    "question": {
        "stem": "W?",
        "choices": [{"text": "ab", "label": "A"}, {"text": "cd", "label": "B"}, {"text": "ef", "label": "C"}],
    },
    "answerKey": "C",
}  # fmt: skip


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def test_both_forms_of_arc_are_read(tmp_path: Path) -> None:
    a, b = q.read_questions(write_lines(tmp_path / "q.jsonl", HUB, "", AI2))
    assert a == q.Question("Question: Q?\nAnswer:", ("no", "yes, it is"), 1)
    assert b == q.Question("Question: W?\nAnswer:", ("ab", "cd", "ef"), 2)
    assert len(q.read_questions(tmp_path / "q.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    "bad", ["{", "[]", "3", {**HUB, "answerKey": "9"}, {**HUB, "choices": {"text": ["a"], "label": ["1"]}}, {"question": "x"}]
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ParameterError, match="line 2 is not a question"):
        q.read_questions(write_lines(tmp_path / "q.jsonl", HUB, bad))


@pytest.mark.parametrize("can_rewind", [True, False])
@pytest.mark.parametrize("width", [1, 5])
def test_answers_by_sum_and_by_mean_a_character(can_rewind: bool, width: int) -> None:
    def likes(context: List[int]) -> Any:  # every letter has its own log-likelihood, whatever came before
        row = np.full(VOCABULARY, -20.0)
        row[ord("n")], row[ord("y")], row[ord(" ")] = -1.0, -0.5, -2.0
        return row

    likelihood = {c: float(st.log_softmax(np.array([likes([])], np.float32))[0, ord(c)]) for c in "ny "}
    # " n": -3 and per character -3; " yyyyy": -4.5 and per character -0.9
    question = q.Question("Question: ?\nAnswer:", ("n", "yyyyy"), 1)
    got = q.answer(FakeScorer(likes, can_rewind), question, width)
    assert likelihood["n"] > 5 * likelihood["y"] and (got.plain, got.normalised) == (0, 1)
    figures = q.summarise([got] * 4, [got] * 4)
    assert figures["acc"].value == 0 and figures["acc_norm"].value == 1
    assert figures["acc_change"].value == 0 and figures["same_answer"].value == 1
    few, many = (q.summarise([got] * n, [got] * n)["acc_change"] for n in (4, 100))
    assert few.low < many.low < 0 < many.high < few.high and many.high == pytest.approx(0.037, abs=0.001)


# ---- settings and tuning ---------------------------------------------------------------------------------------------


def test_settings() -> None:
    base = OffloadParams(expert_cache="25%", exact=True)
    low = parse_setting("low=0.3:0.6", base)
    assert (low.params.t1, low.params.t2, low.params.exact, low.params.expert_cache) == (0.3, 0.6, False, "25%")
    assert low.depends_on_cache and not parse_setting("weight", base).depends_on_cache
    drop = parse_setting("drop", base)
    assert drop.tuned and drop.with_value(0.5).params.drop_fraction == 0.5 and drop.with_value(0.5).depends_on_cache
    assert drop.with_value(0).params == exact_setting(base).params
    assert parse_setting("drop=0.7", base).params.precision_rule == "drop" and not parse_setting("drop=0.7", base).tuned
    assert parse_setting("topk=3", base).params.max_experts == 3
    assert [kind_of(parse_setting(x, base).params) for x in ("exact", "low", "weight", "drop=1", "topk=1")] == [
        "exact", "low", "weight", "drop", "topk",
    ]  # fmt: skip
    for bad in ("", "lru", "low=1", "drop=x", "topk=0", "topk=1.5", "exact=1", "low=0.9:0.1"):
        with pytest.raises(ParameterError):
            parse_setting(bad, base)


@pytest.mark.parametrize("target", [95.0, 60.0, 20.0, 5.0])
def test_tuning_a_fraction_finds_the_bytes(target: float) -> None:
    tries = []

    def bytes_at(f: float) -> float:
        tries.append(f)
        return 100 * math.exp(-f)

    found = tune_fraction(bytes_at, 100.0, 4.0, target)
    assert abs(found.bytes_per_token / found.target - 1) <= 0.03 and len(tries) <= 6
    assert found.bytes_per_token == pytest.approx(100 * math.exp(-found.value))


def test_tuning_stops_where_there_is_nothing_to_find() -> None:
    assert tune_fraction(lambda f: 1 / 0, 100.0, 4.0, 120.0).value == 0  # reads more than exact mode: drop nothing
    assert tune_fraction(lambda f: 100 - f, 100.0, 4.0, 10.0).value == 4  # cannot be reached: the largest
    assert tune_fraction(lambda f: 100 - f, 100.0, 4.0, 0.0).value == 4


@pytest.mark.parametrize(("target", "want"), [(100.0, 8), (98.0, 8), (90.0, 7), (51.0, 4), (20.0, 2), (1.0, 1)])
def test_tuning_a_number_of_experts(target: float, want: int) -> None:
    assert tune_whole(lambda k: 12.5 * k, 100.0, 8, target).value == want


# ---- the whole of it -------------------------------------------------------------------------------------------------


def test_a_run_on_made_up_models(tmp_path: Path) -> None:
    opened: List[Any] = []
    rng = np.random.default_rng(4)
    table = rng.standard_normal((VOCABULARY, VOCABULARY))

    def open_model(setting: Any, n_ctx: int, width: int, pool: Optional[int]) -> FakeScorer:
        assert width == 1 and n_ctx == 30
        lossy = setting.kind != "exact"
        model = FakeScorer(lambda c: table[c[-1]] * (0.9 if lossy else 1.0), bytes_per_token=400_000 if lossy else 1_000_000)
        opened.append((setting.name, model))
        return model

    base = OffloadParams()
    plan = Plan(
        settings=[parse_setting(x, base) for x in ("low", "drop=0.5", "exact")],
        text=text_file(tmp_path), n_tokens=100, warmup=20, window=30,
        questions=[q.Question("Question: ?\nAnswer:", ("a", "b"), 0)],
    )  # fmt: skip
    result = run(plan, open_model, Silence())
    assert [name for name, _ in opened] == ["exact", "exact", "low", "drop=0.5"] and all(m.closed for _, m in opened)
    assert [row["name"] for row in result["settings"]] == ["low", "drop=0.5", "exact"]
    low, _, exact = result["settings"]
    assert exact["mb_saved_per_token"] is None and exact["text"]["kl"]["value"] == 0
    assert low["mb_saved_per_token"] == pytest.approx(0.6)
    assert low["lost_per_mb_saved"]["kl"]["value"] == pytest.approx(low["text"]["kl"]["value"] / 0.6)
    assert low["questions"]["questions"] == 1
    json.dumps(result, allow_nan=False)


def test_a_text_shorter_than_what_settings_are_tuned_on(tmp_path: Path) -> None:
    def open_model(setting: Any, n_ctx: int, width: int, pool: Optional[int]) -> FakeScorer:
        fraction = setting.params.drop_fraction or 0.0
        n_bytes = {"exact": 1000, "low": 700}.get(setting.kind, int(1000 * (1 - fraction / 4)))
        model = FakeScorer(uniform, bytes_per_token=n_bytes)
        model.offload_info = made_up_info(n_expert_used=4)  # type: ignore[attr-defined]
        return model

    settings = [parse_setting(x, OffloadParams()) for x in ("exact", "low", "drop")]
    plan = Plan(settings=settings, text=text_file(tmp_path), n_tokens=40, window=20, tune_tokens=128)
    drop = run(plan, open_model, Silence())["settings"][2]
    assert drop["tuning"]["value"] == pytest.approx(1.2, rel=0.1)


def test_the_pool_is_that_beside_the_context_of_the_longest_question(tmp_path: Path) -> None:
    opened: List[Any] = []

    def open_model(setting: Any, n_ctx: int, width: int, pool: Optional[int]) -> FakeScorer:
        opened.append((n_ctx, pool is None))
        model = FakeScorer(uniform, bytes_per_token=1000)
        model.offload_info = made_up_info(pool_max=9)  # type: ignore[attr-defined]
        return model

    questions = [q.Question("Question: why not? " * 5 + "Answer:", ("a", "b"), 0)]
    run(Plan(settings=[parse_setting("low", OffloadParams())], questions=questions, window=20), open_model, Silence())
    long = opened[1][0]
    assert long > 100 and opened == [(20, True), (long, True), (long, False), (long, False)]


@pytest.mark.parametrize(("at", "finished"), [("preparing", []), ("exact", []), ("low", ["exact"])])
def test_what_was_finished_before_ctrl_c_is_kept(tmp_path: Path, capsys: Captured, at: str, finished: List[str]) -> None:
    class Impatient(Silence):
        def phase(self, name: str, total: int) -> None:
            if name == at:
                raise KeyboardInterrupt

    def open_model(setting: Any, n_ctx: int, width: int, pool: Optional[int]) -> FakeScorer:
        return FakeScorer(uniform, bytes_per_token=1000)

    settings = [parse_setting(x, OffloadParams()) for x in ("low", "exact")]
    result = run(Plan(settings=settings, text=text_file(tmp_path), n_tokens=50, window=20), open_model, Impatient())
    assert result["interrupted"] and [row["name"] for row in result["settings"]] == finished
    table.show(result, Console(width=100))
    assert "interrupted" in capsys.readouterr().out


def test_plans_that_make_no_sense() -> None:
    base = OffloadParams()
    for settings, more, message in (
        (["exact"], {}, "nothing to measure"),
        (["drop"], {"questions": [1]}, "tuned on a text"),
        (["drop", "exact"], {"text": Path("x")}, "add low"),
    ):
        plan = Plan(settings=[parse_setting(x, base) for x in settings], **more)
        with pytest.raises(ParameterError, match=message):
            run(plan, None, Silence())  # type: ignore[arg-type]


def test_width() -> None:
    def width(*names: str, **more: Any) -> int:
        return Plan(settings=[parse_setting(n, OffloadParams()) for n in names], **more).width

    assert width("exact", "weight", "topk=2") == 64
    assert width("exact", "low") == width("topk=1", "drop=1") == width("exact", one_by_one=True) == 1


@quiet
@pytest.mark.parametrize("width", [1, 16])
def test_the_scorer_gives_the_logits_of_llama(width: int) -> None:
    path = str(tiny("qwen3moe"))
    stock = load(Llama, path, 1)
    model = LlamaScorer(
        path, offload="lru", expert_cache="30%", n_ctx=128, n_batch=16, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False
    )  # fmt: skip
    tokens = model.words("the expert of the layer is in that token and the expert", True)
    assert tokens[0] == model.token_bos()
    want = logits(stock, tokens, width)
    model.restart()
    got = [model.feed(tokens[i : i + width]).copy() for i in range(0, len(tokens), width)]
    assert np.array_equal(np.concatenate(got), want)
    assert model.rewind(3)
    assert np.array_equal(model.feed(tokens[3 : 3 + width])[0], want[3]) or width > 1
    counts = model.counts()
    assert counts is not None and counts.n_tokens == len(tokens) + len(tokens[3 : 3 + width])
    model.close()
    stock.close()


@quiet
def test_the_command_on_a_tiny_model(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "eval.json"
    questions = write_lines(tmp_path / "q.jsonl", HUB, AI2)
    args = ["eval", str(tiny_dual("mixtral")), "--text", str(text_file(tmp_path)), "--tokens", "60", "--warmup", "20", "-c", "40"]
    args += ["-t", "1", "-tb", "1", "--expert-cache", "30%", "--questions", str(questions), "--json", str(out)]
    assert main([*args, "--against", "exact,low=0.4:0.9,drop,topk,weight", "--tune-tokens", "30"]) == 0
    shown = capsys.readouterr().out
    for word in ("perplexity", "KL, mnat", "acc_norm", "lost a MB saved", "one token per decode", "tokens to warm up"):
        assert word in shown
    result = json.loads(out.read_text())
    rows: Dict[str, Any] = {row["name"]: row for row in result["settings"]}
    assert list(rows) == ["exact", "low=0.4:0.9", "drop", "topk", "weight"]
    assert rows["exact"]["text"]["kl"]["value"] == 0 and rows["exact"]["offload"]["skipped"] == 0
    assert rows["low=0.4:0.9"]["text"]["kl"]["value"] > 0 and rows["low=0.4:0.9"]["offload"]["low"] > 0
    assert rows["topk"]["tuning"]["value"] == 1 and rows["topk"]["offload"]["skipped"] == pytest.approx(0.5)
    assert rows["drop"]["offload"]["low"] == 0 and rows["drop"]["tuning"]["tried"]
    assert rows["exact"]["expert_pool"] == rows["drop"]["expert_pool"] == rows["topk"]["expert_pool"]
    assert result["conditions"]["tokens_per_decode"] == 1 and result["hobbit"]


@quiet
def test_the_command_without_offload_and_batched(tmp_path: Path, capsys: Captured) -> None:
    args = ["eval", str(tiny_dual("mixtral")), "--text", str(text_file(tmp_path)), "--tokens", "60", "-t", "1", "-tb", "1"]
    assert main([*args, "--offload", "none", "--json", str(tmp_path / "a")]) == 0
    assert main([*args, "--expert-cache", "100%", "--precision-rule", "weight", "--json", str(tmp_path / "b")]) == 0
    assert "64 tokens per decode" in capsys.readouterr().out
    stock, exact = (json.loads((tmp_path / x).read_text())["settings"][0]["text"]["perplexity"] for x in "ab")
    assert stock["value"] == pytest.approx(exact["value"], rel=1e-3)


@quiet
def test_an_ordinary_file_is_measured_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    args = ["eval", str(tiny("mixtral")), "--text", str(text_file(tmp_path)), "--tokens", "30", "--warmup", "0", "-t", "1"]
    assert main([*args, "-tb", "1", "--expert-cache", "50%", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["settings"]] == ["exact"] and result["conditions"]["warmup_tokens"] == 0


def test_usage_errors_are_one_line(tmp_path: Path, capsys: Captured) -> None:
    text = str(text_file(tmp_path))
    model = str(tiny("mixtral"))
    for args, message in (
        ([model], "nothing to measure"),
        ([model, "--text", "no-such-file"], "no such file"),
        ([model, "--text", text, "--against", "low,low"], "name each setting once"),
        ([model, "--text", text, "--against", "low", "--exact"], "names the settings itself"),
        ([model, "--text", text, "--against", "nothing"], "there is no setting"),
        ([model, "--text", text, "--json", "/no/such/folder/x"], "not a folder"),
        ([model, "--text", text, "--against", "low", "--expert-cache", "30%", "-t", "1", "--tokens", "9"], "hobbit convert"),
    ):
        assert main(["eval", *args]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


def test_a_warm_up_is_not_counted() -> None:
    scorer = FakeScorer(uniform)
    steps: List[int] = []
    t.warm_up(scorer, list(range(50)), 7, 20, steps.append)
    assert scorer.n == 0 and sum(steps) == 50


def test_no_agreement_at_all_is_not_certain() -> None:
    def scores(best: int) -> t.TextScores:
        return t.TextScores(np.full(100, -1.0), np.full(100, best), np.zeros(100, np.int64), np.zeros(100))

    figure = t.summarise(scores(1), scores(2))["top1_agreement"]
    assert figure.value == 0 and 0 < figure.high < 0.1


@pytest.mark.parametrize("can_rewind", [True, False])
@pytest.mark.parametrize("width", [1, 5])
def test_every_choice_stands_after_the_question_alone(can_rewind: bool, width: int) -> None:
    question = q.Question("Question: ?\nAnswer:", ("n", "yyyyy", "zz"), 1)
    seen: List[bytes] = []

    def likes(context: List[int]) -> Any:
        seen.append(bytes(context[1:]))
        return np.zeros(VOCABULARY)

    q.answer(FakeScorer(likes, can_rewind), question, width)
    whole = [f"{question.prompt} {c}".encode() for c in question.choices]
    assert all(any(w.startswith(s) for w in whole) for s in seen)


def test_a_choice_that_adds_no_token() -> None:
    class Stripping(FakeScorer):
        def words(self, text: str, begin: bool) -> List[int]:
            return super().words(text.rstrip(), begin)

    q.answer(Stripping(uniform), q.Question("Question: ?\nAnswer:", (" ", "a"), 1), 5)


def test_the_same_answer_is_that_of_acc() -> None:
    question = q.Question("?", ("a", "b"), 0)
    one, other = q.Answered(question, 0, 1), q.Answered(question, 0, 0)
    assert q.summarise([one] * 4, [other] * 4)["same_answer"].value == 1


def test_the_interval_is_of_95_percent() -> None:
    x = np.random.default_rng(5).standard_normal(40_000)
    e = st.mean_of_blocks(x)
    assert (e.high - e.low) / 2 == pytest.approx(1.96 / 200, rel=0.08)
