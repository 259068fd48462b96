"""The measuring behind `hobbit calibrate`.

One pass over the text in exact mode, one over a part of it for each layer, one for each point of the grid.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from .. import __version__
from .._handle import fingerprint
from .._memory import Size
from .._sidecar import LowModel
from ..errors import ParameterError
from ..evaluate import text as t
from ..evaluate.scorer import LlamaScorer
from ..evaluate.statistics import Z95, mean_of_blocks
from ..params import OffloadParams
from ..trace import Trace
from . import curve as cv
from . import weights as wt
from .store import Calibration, low_types

# A batch wants about every low-precision copy of a layer, so the larger it is the less is read for a token; llama.cpp keeps
# the logits of all of it.
_WIDTH = 256
# A layer's sensitivity goes by the root of a divergence, and is not needed closer than to a tenth.
_FOR_A_LAYER = 1 / 4
# Sensitivities for which a layer is low or high as a whole, whatever its router weights are; T1 lies between their scores.
_ALL_LOW, _ALL_HIGH, _BETWEEN = 0.0, 1e9, 0.5
_HELD_OUT = 1 / 3

# (doing what, steps done, steps in all)
Progress = Callable[[str, int, int], None]

__all__ = ["Measured", "calibrate", "measure"]


@dataclass
class Measured:
    """Exact mode on the text: its routing (weights as the model gives them) and perplexity; and the curve."""

    trace: Trace
    perplexity: float
    curve: cv.Curve


def measure(model: LlamaScorer, passage: t.Passage, width: int, progress: Progress, scratch: Optional[Path] = None) -> Measured:
    """Runs exact mode, each layer in low precision, and the grid over a passage.

    Args:
        model: loaded with the rule "weight".
        width: tokens a llama_decode.
        scratch: folder for the predictions of exact mode (2 bytes a token and word); None: the system's.
    """
    info, session = model.offload_info, model._offloaded()
    points = cv.grid(info.n_expert_used)
    part = _beginning(passage, max(2, round(_FOR_A_LAYER * passage.n_fed)))
    total, done = passage.n_fed * (1 + len(points)) + part.n_fed * info.n_moe_layer, 0

    def step(n: int) -> None:
        nonlocal done
        done += n
        progress("measuring", done, total)

    log_probs = t.LogProbs(scratch)
    try:
        session.set_thresholds(1.0, 1.0)  # all high
        session.trace(True)
        exact = t.score_text(model, passage, width, step, keep=log_probs)
        ids, weights = session.trace_read()
        session.trace(False)
        lens = np.array([len(w) - 1 for w in passage.windows], np.int32)
        trace = Trace(ids=ids, weights=weights, lens=lens, n_experts=info.n_expert)
        session.set_thresholds(_BETWEEN, 1.0)
        kl = []
        for layer in range(info.n_moe_layer):
            session.set_sensitivity([_ALL_LOW if i == layer else _ALL_HIGH for i in range(info.n_moe_layer)])
            kl.append(float(t.score_text(model, part, width, step, against=log_probs).kl.mean()))
        sensitivity = cv.sensitivity_of(kl)
        session.set_sensitivity(sensitivity)
        quantiles, by_weight = cv.quantiles_by_cost(weights, sensitivity)
        low_cost = info.bytes_expert_low / info.bytes_expert_high
        plane = cv.Curve(info.n_expert_used, low_cost, sensitivity, quantiles, by_weight, ())
        out = []
        for low, skipped in points:
            t1, t2 = plane.thresholds(low, skipped)
            session.set_thresholds(t1, t2)
            model.forget_counts()
            out.append(_point(low, skipped, t1, t2, exact, t.score_text(model, passage, width, step, against=log_probs)))
    finally:
        log_probs.close()
    return Measured(trace, float(np.exp(-exact.log_likelihood.mean())), replace(plane, points=tuple(out)))


def _beginning(passage: t.Passage, n_fed: int) -> t.Passage:
    """The first windows of a passage, the last of them cut, so that so many tokens are computed."""
    windows: List[List[int]] = []
    for window in passage.windows:
        left = n_fed - sum(len(w) - 1 for w in windows)
        if left <= passage.skip:
            break
        windows.append(window[: left + 1])
    return replace(passage, windows=windows, n_scored=sum(len(w) - 1 - passage.skip for w in windows))


def _point(low: float, skipped: float, t1: float, t2: float, exact: t.TextScores, scores: t.TextScores) -> cv.Point:
    loss = mean_of_blocks(exact.log_likelihood - scores.log_likelihood, scores.group)
    spread = (loss.high - loss.low) / (2 * Z95)
    c = scores.counts
    return cv.Point(
        low=low,
        skipped=skipped,
        t1=t1,
        t2=t2,
        served=(c.share_high, c.share_low, c.share_skipped),
        loss=loss.value,
        loss_se=spread if np.isfinite(spread) else 1.0,
        kl=float(scores.kl.mean()),
        top1=float((scores.best == exact.best).mean()),
    )


def calibrate(
    model: Union[str, os.PathLike[str]],
    text: Union[str, os.PathLike[str]],
    *,
    n_tokens: int = 2048,
    window: int = 512,
    paper: bool = False,
    memory: Optional[Size] = None,
    expert_cache: Optional[Size] = None,
    low_model: LowModel = None,
    threads: Optional[int] = None,
    scratch: Optional[Path] = None,
    progress: Progress = lambda doing, done, total: None,
) -> Calibration:
    """Measures a model on a text.

    Args:
        n_tokens: predictions scored, at the end of the text: of the same, `hobbit imatrix` takes the inputs that low copies are
            fitted to from before it, and these lose less than other text; window: tokens of context.
        paper: keep the paper's thresholds 0.6 and 0.9 under "thresholds" instead of its quantiles.
        memory, expert_cache, low_model, threads: as for `hobbit_cpp.Llama`.
        scratch: folder for 2 bytes a token and word of the vocabulary.

    Raises:
        ParameterError: a model without low-precision copies, a text that is too short.
    """
    path = os.fspath(model)
    params = OffloadParams(
        precision_rule="weight",
        prefetch_depth=0,
        calibration=False,
        expert_cache=expert_cache,
        low_model=low_model,
        heat=False,
        yield_memory=False,
    )
    types = low_types(path, params)
    if not types:
        raise ParameterError(
            f"{path} has no low-precision copies, so there is nothing to calibrate: make them with `hobbit convert {path} "
            "--sidecar`"
        )
    width = min(_WIDTH, window)
    sizes = {"n_ctx": window, "n_batch": width, "n_ubatch": width, "n_threads": threads, "n_threads_batch": threads}
    sizes["flash_attn"] = True  # as what runs later, and `hobbit eval`
    scorer = LlamaScorer(path, offload=params, memory=memory, verbose=False, **sizes)
    try:
        info = scorer.offload_info
        passage = t.read_passage(scorer, Path(text), n_tokens, 0, window, 0, from_end=True)
        measured = measure(scorer, passage, width, progress, scratch)
    finally:
        scorer.close()
    thresholds = cv.PAPER_THRESHOLDS if paper else cv.paper_quantiles(measured.trace.weights)
    found, report = _weights(measured.trace, info, thresholds, progress)
    text_facts: Dict[str, Any] = {
        "name": os.path.basename(os.fspath(text)),
        "tokens": passage.n_scored,
        "window": window,
        "perplexity": measured.perplexity,
    }
    return Calibration(
        fingerprint=fingerprint(path),
        low_types=types,
        curve=measured.curve,
        thresholds=thresholds,
        thresholds_are="the paper's" if paper else "at the paper's quantiles",
        eviction_weights=found,
        eviction=report,
        text=text_facts,
        hobbit=__version__,
    )


def _weights(
    trace: Trace, info: Any, thresholds: Tuple[float, float], progress: Progress
) -> Tuple[Optional[wt.Weights], Dict[str, Any]]:
    """Found on the first two thirds of the routing, checked on the last."""
    cut = max(1, int(trace.n_tokens * (1 - _HELD_OUT)))
    parts = [
        wt.Penalties(part, info.bytes_expert_high, info.bytes_expert_low, thresholds)
        for part in (trace.head(cut), trace.tail(trace.n_tokens - cut))
    ]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("finding eviction weights", done, max(wt.EXPECTED_STEPS, done))

    return wt.find_weights(parts[0], parts[1], step)
