"""Scoring a text: log-likelihood of its tokens, and how far the predictions are from those of exact mode."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .._texts import first_tokens, read_part
from ..errors import ParameterError
from .scorer import Scorer
from .statistics import Estimate, FloatArray, kl_divergence, log_softmax, mean_of_blocks, quantile_of_blocks, wilson

Step = Callable[[int], None]


@dataclass(frozen=True)
class Passage:
    """What is scored: windows of tokens, each a sequence of its own, after a warm-up that is not scored.

    Attributes:
        warmup: tokens that fill the cache.
        windows: the first token of each is given, the others are predicted.
        skip: predictions at the start of a window that are not scored, for want of context.
        n_scored: predictions that are.
    """

    warmup: List[int]
    windows: List[List[int]]
    skip: int
    n_scored: int

    @property
    def n_fed(self) -> int:
        """Tokens that the model has to compute, the warm-up left out."""
        return sum(len(w) - 1 for w in self.windows)


def read_passage(
    scorer: Scorer, path: Path, n_tokens: int, warmup: int, window: int, skip: int, from_end: bool = False
) -> Passage:
    """The beginning of a text file, cut.

    Args:
        from_end: its end instead.
        n_tokens: predictions that are scored, over all windows.
        warmup: tokens before them that only fill the cache.
        window: tokens of context that the model has.
        skip: see `Passage`.

    Raises:
        ParameterError: the text is shorter than that, or the window too small.
    """
    if skip >= window - 1:
        raise ParameterError(f"in windows of {window} tokens nothing is left to score after the first {skip}")
    first = scorer.words("", True)
    n_windows = -(-n_tokens // (window - 1 - skip))
    wanted = warmup + n_tokens + n_windows * (1 + skip - len(first))
    with open(path, "rb") as file:
        # A pipe has no second reading.
        piped = None if file.seekable() else read_part(file, path, None)

        def part(n_bytes: int) -> Tuple[str, bool]:
            if piped is not None:
                return piped
            file.seek(0)
            return read_part(file, path, n_bytes, from_end)

        tokens = list(first_tokens(lambda text: scorer.words(text, False), part, wanted))
    if not tokens:
        raise ParameterError(f"{path} is empty: there is nothing to score")
    windows: List[List[int]] = []
    at, left = warmup, n_tokens
    if from_end:
        tokens = tokens[max(0, len(tokens) - wanted) :]
    while left > 0:
        body = tokens[at : at + min(window - len(first), left + skip + 1 - len(first))]
        if len(first) + len(body) < 2 + skip:
            raise ParameterError(
                f"{path} has {len(tokens)} tokens, too few for {n_tokens} scored ones after {warmup} to warm up: "
                f"give fewer, at most --tokens {n_tokens - left}, or a longer text"
            )
        windows.append(first + body)
        left -= len(first) + len(body) - 1 - skip
        at += len(body)
    return Passage(tokens[:warmup], windows, skip, n_tokens - left)


class LogProbs:
    """Log probabilities over the vocabulary of exact mode, one row a token, on disk: 16-bit floats, written and read in order.

    A row of a vocabulary of 150,000 is 300 kB; memory holds one at a time. Rounding makes a divergence of about 1e-7.
    """

    def __init__(self, folder: Optional[Path]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="hobbit-eval-")  # noqa: SIM115
        self._width = 0

    def append(self, row: FloatArray) -> None:
        self._width = len(row)
        self._file.write(np.maximum(row, -65000.0).astype(np.float16).tobytes())

    def rows(self) -> Iterator[FloatArray]:
        """From the first, normalised again after rounding."""
        self._file.seek(0)
        while True:
            data = self._file.read(2 * self._width)
            if not data:
                return
            row = np.frombuffer(data, np.float16).astype(np.float64)
            yield row - np.log(np.exp(row).sum())

    def close(self) -> None:
        self._file.close()


@dataclass
class TextScores:
    """One entry a scored token.

    Attributes:
        log_likelihood: of the token that came.
        best: the likeliest token.
        group: the window.
        kl: from exact mode, in nats; empty for exact mode itself.
        prefix_bytes: read from disk a token, over the first tokens of `score_text(prefix=)`.
    """

    log_likelihood: FloatArray
    best: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    kl: FloatArray
    seconds: float = 0.0
    prefix_bytes: Optional[float] = None
    counts: Any = field(default=None)


def warm_up(scorer: Scorer, tokens: Sequence[int], width: int, window: int, step: Step) -> None:
    """Computes tokens, and forgets that it was counted."""
    for begin in range(0, len(tokens), window):
        scorer.restart()
        part = tokens[begin : begin + window]
        for i in range(0, len(part), width):
            step(len(scorer.feed(part[i : i + width])))
    scorer.forget_counts()


def score_text(
    scorer: Scorer,
    passage: Passage,
    width: int,
    step: Step,
    *,
    keep: Optional[LogProbs] = None,
    against: Optional[LogProbs] = None,
    prefix: int = 0,
) -> TextScores:
    """Runs a passage, `width` tokens a llama_decode.

    Args:
        keep: receives the log probabilities (exact mode).
        against: those of exact mode, over the same passage at the same width.
        prefix: tokens after which the bytes read are noted.
    """
    log_likelihood, best, group, kl = [], [], [], []
    exact = against.rows() if against is not None else None
    fed = 0
    prefix_bytes: Optional[float] = None
    for number, window in enumerate(passage.windows):
        scorer.restart()
        for begin in range(0, len(window) - 1, width):
            given = window[begin : min(begin + width, len(window) - 1)]
            logits = scorer.feed(given)
            fed += len(given)
            step(len(given))
            if prefix_bytes is None and 0 < prefix <= fed:
                counts = scorer.counts()
                prefix_bytes = counts.bytes_per_token if counts is not None else None
            for i in range(max(0, passage.skip - begin), len(given)):
                log_p = log_softmax(logits[i : i + 1])[0]
                log_likelihood.append(float(log_p[window[begin + i + 1]]))
                best.append(int(logits[i].argmax()))
                group.append(number)
                if keep is not None:
                    keep.append(log_p)
                if exact is not None:
                    kl.append(float(kl_divergence(next(exact), log_p)))
    counts = scorer.counts()
    if prefix_bytes is None and prefix > 0 and counts is not None:
        prefix_bytes = counts.bytes_per_token  # of a passage that is shorter
    return TextScores(
        np.array(log_likelihood), np.array(best, np.int64), np.array(group, np.int64), np.array(kl),
        counts.eval_seconds if counts is not None else 0.0, prefix_bytes, counts,
    )  # fmt: skip


def summarise(scores: TextScores, exact: Optional[TextScores]) -> Dict[str, Any]:
    """Figures of a setting; those against exact mode are paired, token by token."""
    out: Dict[str, Any] = {
        "tokens": len(scores.log_likelihood),
        "perplexity": _perplexity(scores),
    }
    if exact is not None:
        loss = exact.log_likelihood - scores.log_likelihood
        agree = scores.best == exact.best
        kl = scores.kl if len(scores.kl) else np.zeros(len(loss))
        out["loss"] = mean_of_blocks(loss, scores.group)
        out["perplexity_change"] = out["loss"].map(np.expm1)
        out["kl"] = mean_of_blocks(kl, scores.group)
        out["kl_95"] = quantile_of_blocks(kl, 0.95, scores.group)
        if agree.all() or not agree.any():  # no spread that a bootstrap could see
            out["top1_agreement"] = wilson(int(agree.sum()), len(agree))
        else:
            out["top1_agreement"] = mean_of_blocks(agree * 1.0, scores.group)
    return out


def _perplexity(scores: TextScores) -> Estimate:
    return mean_of_blocks(-scores.log_likelihood, scores.group).map(lambda x: float(np.exp(x)))
