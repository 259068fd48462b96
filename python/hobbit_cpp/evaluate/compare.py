"""The run: exact mode first, whose predictions are kept on disk, then each setting over the same tokens.

Every setting has a model of its own, loaded anew, so that all start with an empty cache; the same expert pool, the same
warm-up, the same number of tokens a llama_decode. One model is in memory at a time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Sequence

from .._handle import ModelInfo
from .._memory import forget_peak
from ..errors import ParameterError
from . import questions as q
from . import text as t
from .scorer import BATCH_WIDTH, Scorer
from .settings import Setting, exact_setting
from .statistics import Estimate
from .tuning import Tuned, tune_fraction, tune_whole


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        settings: in the order of the table. Empty: the model as it is, without offload.
        text: file to score, or None; n_tokens: predictions scored; warmup: tokens before them that are not.
        window: tokens of context; skip: predictions at the start of each window that are not scored.
        questions: multiple choice, or empty.
        tune_tokens: tokens on which tuned settings are matched; target: bytes a token they shall read (None: those of "low").
        as_is: nobody named the settings: what the file cannot do is left out.
        one_by_one: one token a llama_decode even where no rule depends on the cache.
        scratch: folder for the predictions of exact mode; None: the system's.
    """

    settings: Sequence[Setting]
    text: Optional[Path] = None
    n_tokens: int = 512
    warmup: int = 128
    window: int = 512
    skip: int = 0
    questions: Sequence[q.Question] = ()
    tune_tokens: int = 128
    target: Optional[float] = None
    as_is: bool = False
    one_by_one: bool = False
    scratch: Optional[Path] = None

    @property
    def width(self) -> int:
        """Tokens a llama_decode. One, where what is computed depends on the cache, or where bytes a token are compared."""
        if self.one_by_one or any(s.depends_on_cache or s.tuned for s in self.settings):
            return 1
        return min(BATCH_WIDTH, self.window)


class Open(Protocol):
    """Loads the model with a setting (None: without offload)."""

    def __call__(self, setting: Optional[Setting], n_ctx: int, width: int, pool: Optional[int]) -> Scorer:
        """`pool`: bytes of the expert pool; None: what the budget leaves."""


class Watcher(Protocol):
    """Told how far it is."""

    def phase(self, name: str, total: int) -> None:
        """A new piece of work, of `total` steps."""

    def step(self, n: int) -> None:
        """`n` steps are done."""


@dataclass
class Row:
    """One setting, measured."""

    setting: Optional[Setting]
    text: Optional[t.TextScores] = None
    answers: Optional[List[q.Answered]] = None
    text_figures: Dict[str, Any] = field(default_factory=dict)
    question_figures: Dict[str, Any] = field(default_factory=dict)
    question_counts: Any = None
    pool_bytes: int = 0
    peak_memory: int = 0
    tuned: Optional[Tuned] = None

    @property
    def name(self) -> str:
        return "stock" if self.setting is None else self.setting.name

    @property
    def counts(self) -> Any:
        """OffloadStats of the text, or of the questions where there is no text; None without offload."""
        return self.text.counts if self.text is not None else self.question_counts


class _Run:
    def __init__(self, plan: Plan, open_model: Open, watcher: Watcher) -> None:
        self.plan, self.open, self.watcher = plan, open_model, watcher
        self.passage: Optional[t.Passage] = None
        self.n_ctx = plan.window
        self.pool: Optional[int] = None
        self.info: Optional[ModelInfo] = None
        self.log_probs: Optional[t.LogProbs] = None
        self.rows: List[Row] = []

    def prepare(self, setting: Optional[Setting]) -> None:
        """Cuts the text and settles on one expert pool for all: what exact mode gets, less what two loads may differ by."""
        plan = self.plan
        self.watcher.phase("preparing", 1)
        model = self.open(setting, self.n_ctx, plan.width, None)
        try:
            if plan.text is not None:
                self.passage = t.read_passage(model, plan.text, plan.n_tokens, plan.warmup, plan.window, plan.skip)
            longest = q.longest(model, plan.questions) if plan.questions else 0
            if longest > self.n_ctx:  # whose KV cache leaves the pool less
                self.n_ctx = longest
                model.close()
                model = self.open(setting, self.n_ctx, plan.width, None)
            counts = model.counts()
            if counts is not None and setting is not None:
                self.info = getattr(model, "offload_info", None)
                if self.info is not None and counts.pool_bytes < self.info.pool_max and setting.params.expert_cache is None:
                    spare = max(16 << 20, counts.pool_bytes // 64)
                    self.pool = max(self.info.pool_min, counts.pool_bytes - spare)
        finally:
            model.close()

    def row(self, setting: Optional[Setting], exact: Optional[Row]) -> Row:
        plan = self.plan
        row = Row(setting)
        forget_peak()
        model = self.open(setting, self.n_ctx, plan.width, self.pool)
        try:
            if self.passage is not None:
                self.watcher.phase(row.name, len(self.passage.warmup) + self.passage.n_fed)
                t.warm_up(model, self.passage.warmup, plan.width, plan.window, self.watcher.step)
                keep = against = None
                if setting is not None and exact is None and self._compares():
                    keep = self.log_probs = t.LogProbs(plan.scratch)
                elif exact is not None:
                    against = self.log_probs
                row.text = t.score_text(
                    model, self.passage, plan.width, self.watcher.step,
                    keep=keep, against=against, prefix=plan.tune_tokens,
                )  # fmt: skip
                row.text_figures = t.summarise(row.text, (exact or row).text if setting is not None else None)
            if plan.questions:
                model.forget_counts()
                self.watcher.phase(f"{row.name}: questions", len(plan.questions))
                row.answers = q.answer_all(model, plan.questions, plan.width, self.watcher.step)
                before = (exact or row).answers if setting is not None else None
                row.question_figures = q.summarise(row.answers, before)
                row.question_counts = model.counts()
            counts = model.counts()
            if counts is not None:
                row.pool_bytes, row.peak_memory = counts.pool_bytes, counts.peak_memory
        finally:
            model.close()
        return row

    def _compares(self) -> bool:
        return any(s.kind != "exact" for s in self.plan.settings)

    def bytes_on_prefix(self, setting: Setting) -> float:
        """Read a token on the first tokens of the passage, after the same warm-up."""
        assert self.passage is not None
        plan = self.plan
        short = replace(self.passage, windows=_first(self.passage.windows, plan.tune_tokens), n_scored=0)
        self.watcher.phase(f"{setting.name}: tuning", len(short.warmup) + short.n_fed)
        model = self.open(setting, self.n_ctx, plan.width, self.pool)
        try:
            t.warm_up(model, short.warmup, plan.width, plan.window, self.watcher.step)
            scores = t.score_text(model, short, plan.width, self.watcher.step, prefix=plan.tune_tokens)
        finally:
            model.close()
        return scores.prefix_bytes if scores.prefix_bytes is not None else math.nan

    def tune(self, setting: Setting, exact: Row) -> Tuned:
        """The value at which the setting reads what "low" read on the same tokens."""
        assert exact.text is not None and self.info is not None
        target = self.plan.target
        if target is None:
            low = next(r for r in self.rows if r.setting is not None and r.setting.kind in ("low", "weight"))
            assert low.text is not None
            target = low.text.prefix_bytes
        at_most = exact.text.prefix_bytes
        assert target is not None and at_most is not None
        k = self.info.n_expert_used

        def measure(value: float) -> float:
            return self.bytes_on_prefix(setting.with_value(value))

        if setting.kind == "drop":
            return tune_fraction(measure, at_most, float(k), target)
        return tune_whole(measure, at_most, k, target)


def _first(windows: Sequence[List[int]], n: int) -> List[List[int]]:
    """Windows cut after `n` computed tokens."""
    out = []
    for window in windows:
        if n <= 0:
            break
        out.append(window[: n + 1])
        n -= len(out[-1]) - 1
    return out


def check(plan: Plan) -> None:
    """What makes no sense, before any model is loaded.

    Raises:
        ParameterError
    """
    if plan.text is None and not plan.questions:
        raise ParameterError("nothing to measure: give a text, questions, or both")
    tuned = [s.name for s in plan.settings if s.tuned]
    if tuned and plan.text is None:
        raise ParameterError(f"{', '.join(tuned)} without a value is tuned on a text: give one, or a value like {tuned[0]}=1")
    if tuned and plan.target is None and not any(s.kind in ("low", "weight") for s in plan.settings):
        raise ParameterError(
            f"{', '.join(tuned)} without a value is tuned to the MB a token of 'low': add low, or give --target-mb, or a value"
        )


def run(plan: Plan, open_model: Open, watcher: Watcher) -> Dict[str, Any]:
    """Measures; what `table.show` shows and `--json` writes. Ctrl-C ends it early, and whole rows stay.

    Raises:
        ParameterError: a plan that makes no sense.
        HobbitError: what loading and running a model raises.
    """
    check(plan)
    work = _Run(plan, open_model, watcher)
    interrupted = False
    try:
        base = exact_setting(plan.settings[0].params) if plan.settings else None
        work.prepare(base)
        if base is not None and work.info is not None and not work.info.has_low:
            lossy = [s.name for s in plan.settings if s.kind in ("low", "weight")]
            if lossy and plan.as_is:  # such a file is run in high precision
                plan = work.plan = replace(plan, settings=[s for s in plan.settings if s.name not in lossy])
                work.prepare(base)  # batches may be wider now, and leave less for experts
            elif lossy:
                raise ParameterError(
                    f"{', '.join(lossy)} needs low-precision copies, which this file does not have: make one that does with "
                    "`hobbit convert MODEL -o OUT`"
                )
        exact = work.row(base, None)
        work.rows.append(exact)
        # Tuned settings come last: what they are tuned to must be known.
        for setting in sorted((s for s in plan.settings if s.kind != "exact"), key=lambda s: s.tuned):
            tuned = work.tune(setting, exact) if setting.tuned else None
            final = replace(setting.with_value(tuned.value), tuned=True) if tuned is not None else setting
            row = work.row(final, exact)
            row.tuned = tuned
            work.rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if work.log_probs is not None:
            work.log_probs.close()
    return _result(work, interrupted)


def _result(work: _Run, interrupted: bool) -> Dict[str, Any]:
    plan = work.plan
    order = {s.name: i for i, s in enumerate(plan.settings)}
    rows = sorted(work.rows, key=lambda r: order.get(r.name, -1))
    exact = work.rows[0] if work.rows else None
    passage = work.passage
    return {
        "conditions": {
            "tokens_per_decode": plan.width,
            "text": str(plan.text) if plan.text is not None else None,
            "tokens_scored": passage.n_scored if passage is not None else 0,
            "warmup_tokens": len(passage.warmup) if passage is not None else 0,
            "windows": len(passage.windows) if passage is not None else 0,
            "window": plan.window,
            "skip": plan.skip,
            "questions": len(plan.questions),
            "n_ctx": work.n_ctx,
            "expert_pool": work.pool if work.pool is not None else exact.pool_bytes if exact is not None else 0,
            "model": asdict(work.info) if work.info is not None else None,
            "start": "cold: every setting loads the model anew, then the warm-up",
        },
        "settings": [_plain(r, exact) for r in rows],
        "interrupted": interrupted,
    }


def _estimate(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {k: v if math.isfinite(v) else None for k, v in asdict(value).items()}
    return value


def _plain(row: Row, exact: Optional[Row]) -> Dict[str, Any]:
    out: Dict[str, Any] = {
        "name": row.name,
        "kind": row.setting.kind if row.setting is not None else "stock",
        "parameters": {k: v for k, v in asdict(row.setting.params).items() if v is not None} if row.setting else {},
        "text": {k: _estimate(v) for k, v in row.text_figures.items()} or None,
        "questions": {k: _estimate(v) for k, v in row.question_figures.items()} or None,
        "expert_pool": row.pool_bytes,
        "peak_memory": row.peak_memory,
        "offload": None,
        "tuning": None,
        "mb_saved_per_token": None,
        "lost_per_mb_saved": None,
    }
    counts = row.counts
    if counts is not None:
        out["offload"] = {
            "mb_per_token": counts.bytes_per_token / 1e6,
            "hit_rate": counts.hit_rate,
            "high": counts.share_high,
            "low": counts.share_low,
            "skipped": counts.share_skipped,
            "tokens": counts.n_tokens,
            "seconds": counts.eval_seconds,
        }
    if row.tuned is not None:
        out["tuning"] = {
            "value": row.tuned.value,
            "target_mb_per_token": row.tuned.target / 1e6,
            "reached_mb_per_token": row.tuned.bytes_per_token / 1e6,
            "tried": [{"value": v, "mb_per_token": b / 1e6} for v, b in row.tuned.tried],
        }
    if exact is not None and row is not exact and counts is not None and exact.counts is not None:
        saved = (exact.counts.bytes_per_token - counts.bytes_per_token) / 1e6
        out["mb_saved_per_token"] = saved
        if saved > 0 and row.text_figures:
            out["lost_per_mb_saved"] = {
                "kl": _estimate(row.text_figures["kl"].map(lambda x: x / saved)),
                "loss": _estimate(row.text_figures["loss"].map(lambda x: x / saved)),
                "perplexity_percent": _estimate(row.text_figures["perplexity_change"].map(lambda x: 100 * x / saved)),
            }
    return out
