"""Multiple choice by log-likelihood: the choice that the model finds likeliest after the question is its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

from .._texts import common_prefix, decoded
from ..errors import ParameterError
from .scorer import Scorer
from .statistics import Estimate, log_softmax, mean_of_blocks, wilson


@dataclass(frozen=True)
class Question:
    """A question; `answer` is an index into the choices."""

    prompt: str
    choices: Tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answered:
    """What a model chose: by the sum of log-likelihoods, and by that divided by the characters of the choice."""

    question: Question
    plain: int
    normalised: int


def read_questions(path: Path, limit: Optional[int] = None) -> List[Question]:
    """ARC's JSONL, as the Hugging Face hub has it or as AI2 published it.

    Raises:
        ParameterError: a line is not such a question; with its number.
    """
    questions: List[Question] = []
    with path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            if limit is not None and len(questions) >= limit:
                break
            line = decoded(data, f"{path}, line {number}")
            if line.strip():
                try:
                    questions.append(_question(json.loads(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    raise ParameterError(
                        f"{path}, line {number} is not a question in ARC's format ({type(e).__name__}: {e}). Needed: "
                        '{"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}'
                    ) from None
    if not questions:
        raise ParameterError(f"{path} has no questions")
    return questions


def _question(data: Any) -> Question:
    stem, choices = data["question"], data.get("choices")
    if isinstance(stem, dict):
        stem, choices = stem["stem"], stem["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    if len(texts) != len(labels) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise ValueError("choices need a text and a label each, and there must be two at least")
    key = str(data["answerKey"])
    labels = [str(label) for label in labels]
    if key not in labels:
        raise ValueError(f"the answer {key!r} is none of the labels {labels}")
    return Question(f"Question: {stem}\nAnswer:", tuple(texts), labels.index(key))


def longest(scorer: Scorer, questions: Sequence[Question]) -> int:
    """Tokens of context that the longest question needs."""
    return max(len(scorer.words(f"{q.prompt} {c}", True)) for q in questions for c in q.choices)


def answer(scorer: Scorer, question: Question, width: int) -> Answered:
    """Scores every choice after the question, which is computed once."""
    prompt = scorer.words(question.prompt, True)
    whole = [scorer.words(f"{question.prompt} {choice}", True) for choice in question.choices]
    # A choice may be joined to the end of the prompt by the tokenizer: scored is what differs.
    shared = min([len(prompt), *(common_prefix(prompt, w) for w in whole), *(len(w) - 1 for w in whole)])
    shared = max(shared, 1)
    sums = []
    last = _feed(scorer, prompt[:shared], width, restart=True)
    for tokens in whole:
        sums.append(_log_likelihood(scorer, last, tokens[shared:], width))
        if not scorer.rewind(shared):  # a recurrent state cannot go back
            last = _feed(scorer, prompt[:shared], width, restart=True)
    per_character = [s / len(c) for s, c in zip(sums, question.choices)]
    return Answered(question, int(np.argmax(sums)), int(np.argmax(per_character)))


def _feed(scorer: Scorer, tokens: Sequence[int], width: int, restart: bool) -> Any:
    """Log probabilities after the last of them."""
    if restart:
        scorer.restart()
    for i in range(0, len(tokens), width):
        logits = scorer.feed(tokens[i : i + width])
    return log_softmax(logits[-1:])[0]


def _log_likelihood(scorer: Scorer, before: Any, tokens: Sequence[int], width: int) -> float:
    """Of a continuation; `before`: log probabilities of its first token."""
    total = float(before[tokens[0]])
    for i in range(0, len(tokens) - 1, width):
        given = tokens[i : min(i + width, len(tokens) - 1)]
        logits = scorer.feed(given)
        for j in range(len(given)):  # a row at a time: a vocabulary is large
            total += float(log_softmax(logits[j : j + 1])[0, tokens[i + j + 1]])
    return total


def answer_all(scorer: Scorer, questions: Sequence[Question], width: int, step: Callable[[int], None]) -> List[Answered]:
    """In order; `step` is told after each."""
    out = []
    for question in questions:
        out.append(answer(scorer, question, width))
        step(1)
    return out


def _change(differences: npt.NDArray[np.float64], apart: npt.NDArray[np.int64]) -> Estimate:
    if differences.any() or not len(differences):
        return mean_of_blocks(differences, apart)
    # None differs, which a bootstrap takes for certain: as many may as a share of none leaves open.
    most = wilson(0, len(differences)).high
    return Estimate(0.0, -most, most)


def summarise(answers: Sequence[Answered], exact: Optional[Sequence[Answered]]) -> Dict[str, Any]:
    """acc (by the sum) and acc_norm (by the mean a character), each with Wilson's interval, and against exact mode, paired."""
    n = len(answers)
    plain = np.array([a.plain == a.question.answer for a in answers], np.float64)
    normalised = np.array([a.normalised == a.question.answer for a in answers], np.float64)
    out: Dict[str, Any] = {
        "questions": n,
        "acc": wilson(int(plain.sum()), n),
        "acc_norm": wilson(int(normalised.sum()), n),
    }
    if exact is not None:
        before = np.array([a.plain == a.question.answer for a in exact], np.float64)
        before_norm = np.array([a.normalised == a.question.answer for a in exact], np.float64)
        apart = np.arange(n)  # questions do not depend on each other
        out["acc_change"] = _change(plain - before, apart)
        out["acc_norm_change"] = _change(normalised - before_norm, apart)
        same = sum(a.plain == b.plain for a, b in zip(answers, exact))
        out["same_answer"] = wilson(same, n)
    return out
