"""One answer of a model, measured: the prompt and the tokens after it apart."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol, Tuple

from .options import sampling_of
from .worker import Worker

__all__ = [
    "Answer",
    "Model",
    "Phase",
    "Piece",
    "Request",
    "answer_report",
    "cancel_of",
    "completion_pieces",
    "generate",
    "make_report",
    "make_request",
    "measure",
    "peak_memory",
    "summary",
]

# Text, and in the last one why it ended: "stop" or "length".
Piece = Tuple[str, Optional[str]]


class Model(Protocol):
    """What is used of hobbit_cpp.Llama."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the context."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of the file."""

    @property
    def offloaded(self) -> bool:
        """Whether there are statistics of the offload."""

    def create_completion(self, prompt: str, *, stream: bool, **sampling: Any) -> Any:
        """As llama_cpp.Llama."""

    def create_chat_completion(self, messages: list[dict[str, str]], *, stream: bool, **sampling: Any) -> Any:
        """As llama_cpp.Llama."""

    def offload_stats(self) -> Any:
        """OffloadStats. Not called without offload."""

    def reset_offload_stats(self) -> None:
        """All counts to zero."""

    def close(self) -> None:
        """Frees the model."""


@dataclass(frozen=True)
class Request:
    """What to ask."""

    prompt: str
    chat: bool
    system: str | None
    sampling: dict[str, Any]
    offload: bool = True
    """Whether there are statistics."""


@dataclass
class Phase:
    """The prompt, or the tokens generated after the first."""

    tokens: int = 0
    seconds: float = 0.0
    stats: dict[str, Any] | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Answer:
    """What came of it."""

    prompt: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    finish_reason: str | None = None
    interrupted: bool = False


def make_request(args: argparse.Namespace, model: Model, prompt: str) -> Request:
    """The request behind the arguments. The chat template is used when the model has one."""
    has_template = any(key.startswith("tokenizer.chat_template") for key in model.metadata)
    chat = has_template and not args.no_conversation
    if args.system_prompt and not chat:
        raise ValueError(
            "--system-prompt needs the chat template, which "
            + ("--no-conversation leaves out" if has_template else "this model does not have")
        )
    return Request(prompt, chat, args.system_prompt, sampling_of(args), offload=model.offloaded)


def generate(
    model: Model,
    request: Request,
    write: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    worker: Worker | None = None,
) -> Answer:
    """Streams the answer to `write`. Ctrl-C ends it early, and what was measured stays; with a worker also in the prompt."""
    pieces = stream(model, request)
    if worker is None:
        return measure(model, pieces, write, request.offload, clock=clock)
    with worker.stoppable(cancel_of(model)):
        return measure(model, worker.each(pieces), write, request.offload, clock=clock)


def cancel_of(model: Model) -> Callable[[], object]:
    """What makes the evaluation that runs in another thread end."""
    return getattr(model, "cancel", lambda: None)


def measure(
    model: Model,
    pieces: Iterator[Piece],
    write: Callable[[str], None],
    offload: bool,
    reused: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Writes the pieces and measures prompt and answer apart.

    Args:
        pieces: text, and the reason for the end in the last.
        offload: whether there are statistics of the offload.
        reused: tokens of the prompt that were in the context already.
    """
    answer = Answer()
    _reset(model, offload)
    start = clock()
    first: float | None = None
    tokens_before = 0
    try:
        for text, reason in pieces:
            if first is None:
                # with the first chunk the prompt is through and the first token chosen
                first = clock()
                tokens_before = model.n_tokens
                answer.prompt = _phase(model, model.n_tokens - reused, first - start, offload)
                _reset(model, offload)
            if text:
                write(text)
            answer.finish_reason = reason or answer.finish_reason
    except KeyboardInterrupt:
        answer.interrupted = True
    now = clock()
    if first is None:
        answer.prompt = _phase(model, model.n_tokens - reused, now - start, offload)
    else:
        answer.decode = _phase(model, model.n_tokens - tokens_before, now - first, offload)
    return answer


def _phase(model: Model, tokens: int, seconds: float, offload: bool) -> Phase:
    stats = _stats(model, offload)
    # the engine counts what it computes; without it, a prompt that was stopped early may hold less than was reused
    return Phase(max(tokens, 0) if stats is None else stats["n_tokens"], seconds, stats)


def stream(model: Model, request: Request) -> Iterator[Piece]:
    """Pieces of text, with the reason for the end in the last."""
    if request.chat:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.prompt})
        for chunk in model.create_chat_completion(messages, stream=True, **request.sampling):
            choice = chunk["choices"][0]
            yield choice["delta"].get("content") or "", choice["finish_reason"]
    else:
        yield from completion_pieces(model.create_completion(request.prompt, stream=True, **request.sampling))


def completion_pieces(chunks: Iterator[Mapping[str, Any]]) -> Iterator[Piece]:
    """The pieces in what `create_completion(stream=True)` gives."""
    for chunk in chunks:
        choice = chunk["choices"][0]
        yield choice["text"] or "", choice["finish_reason"]


def _reset(model: Model, offload: bool) -> None:
    if offload:
        model.reset_offload_stats()


def _stats(model: Model, offload: bool) -> dict[str, Any] | None:
    """The statistics as plain data, with the figures that are computed from them."""
    if not offload:
        return None
    stats = model.offload_stats()
    out = dataclasses.asdict(stats)
    for name in ("hit_rate", "share_high", "share_low", "share_skipped", "bytes_read", "bytes_per_token", "compute_seconds"):
        out[name] = getattr(stats, name)
    return out


def make_report(path: str, load_seconds: float, answer: Answer) -> dict[str, Any]:
    """All that was measured, ready for JSON."""
    return {"model": path, "load_seconds": load_seconds, **answer_report(answer), "peak_memory": peak_memory(answer)}


def answer_report(answer: Answer) -> dict[str, Any]:
    """What was measured of one answer, ready for JSON."""

    def phase(p: Phase) -> dict[str, Any]:
        return {"tokens": p.tokens, "seconds": p.seconds, "tokens_per_second": p.rate, "offload": p.stats}

    return {
        "prompt": phase(answer.prompt),
        "decode": phase(answer.decode),
        "finish_reason": answer.finish_reason,
        "interrupted": answer.interrupted,
    }


def peak_memory(*answers: Answer) -> int:
    """The most this process held, in bytes."""
    peaks = [p.stats.get("peak_memory") or 0 for answer in answers for p in (answer.prompt, answer.decode) if p.stats]
    if any(peaks):
        return int(max(peaks))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for people."""
    lines = [_speed("prompt", report["prompt"]), _speed("answer", report["decode"])]
    # of the answer; with an answer of one token there is only the prompt
    stats = (report["decode"] if report["decode"]["tokens"] else report["prompt"])["offload"]
    budget = ""
    if stats is not None:
        lines += _offload_lines(stats)
        if stats.get("memory_budget"):
            budget = f" of a budget of {_gib(stats['memory_budget'])}"
    lines.append(f"memory     peak {_gib(report['peak_memory'])}{budget}")
    if report["interrupted"]:
        lines.append("interrupted")
    return "\n".join(lines)


def _speed(name: str, phase: Mapping[str, Any]) -> str:
    return f"{name:<10} {phase['tokens']} tokens in {phase['seconds']:.2f} s, {phase['tokens_per_second']:.2f} tokens/s"


def _offload_lines(stats: Mapping[str, Any]) -> list[str]:
    return [
        f"cache      hit rate {stats['hit_rate']:.1%}, {stats['bytes_per_token'] / 1e6:.1f} MB read a token, "
        f"{stats['stall_seconds']:.2f} s waited",
        f"experts    {stats['share_high']:.1%} high precision, {stats['share_low']:.1%} low, "
        f"{stats['share_skipped']:.1%} skipped",
    ]


def _gib(n: float) -> str:
    return f"{n / (1 << 30):.2f} GiB"
