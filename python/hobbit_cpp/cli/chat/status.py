"""What is said about speed, cache and memory after an answer, and by /stats."""

from __future__ import annotations

from typing import Any

from hobbit_cpp import _memory

from ..generate import Answer, Phase, answer_report, summary
from .session import Chat, Turn

__all__ = ["details", "status_parts"]


def status_parts(chat: Chat, turn: Turn) -> list[str]:
    """The status line in parts, the most telling first."""
    answer = turn.answer
    phase = answer.decode if answer.decode.tokens else answer.prompt
    parts = [f"{phase.rate:.1f} tok/s" if phase is answer.decode else f"read {phase.tokens} tok, {phase.rate:.1f} tok/s"]
    budget = 0
    if phase.stats is not None:
        parts += [f"hit {phase.stats['hit_rate']:.0%}", f"{phase.stats['bytes_per_token'] / 1e6:.1f} MB/tok"]
        budget = phase.stats["memory_budget"]
    parts.append("mem " + _short(_memory.resident(), budget))
    parts.append(f"ctx {turn.context}/{chat.n_ctx}")
    return parts


def details(chat: Chat) -> str:
    """The last answer, the whole session, context and memory: a few lines."""
    lines = []
    if chat.turns:
        turn = chat.turns[-1]
        # the memory line of a summary is below, with what it is now
        lines += summary({**answer_report(turn.answer), "peak_memory": 0}).splitlines()
        lines = [line for line in lines if not line.startswith("memory")]
        if turn.reused:
            lines[0] += f", {turn.reused} more were in the context"
        lines.append(_session([t.answer for t in chat.turns]))
    messages = chat.conversation.messages
    dropped = chat.conversation.first
    lines.append(
        f"context    {chat.model.n_tokens} of {chat.n_ctx} tokens; {len(messages)} messages"
        + (f", {dropped} of them no longer seen" if dropped else "")
    )
    budget = chat.model.offload_stats().memory_budget if chat.offload else 0
    lines.append(f"memory     {_of(_memory.resident(), budget)}, peak {_memory.human(_memory.peak_resident())}")
    return "\n".join(lines)


def _session(answers: list[Answer]) -> str:
    read, said = _sum([a.prompt for a in answers]), _sum([a.decode for a in answers])
    return (
        f"session    {len(answers)} answers: {read.tokens} tokens read in {read.seconds:.1f} s, "
        f"{said.tokens} said in {said.seconds:.1f} s"
    )


def _sum(phases: list[Phase]) -> Phase:
    return Phase(sum(p.tokens for p in phases), sum(p.seconds for p in phases))


def _short(now: int, budget: int) -> str:
    """389/400 MiB"""
    unit, size, digits = ("GiB", 1 << 30, 2) if max(now, budget) >= 1 << 30 else ("MiB", 1 << 20, 0)
    numbers = [now, budget] if budget else [now]
    return "/".join(f"{n / size:.{digits}f}" for n in numbers) + f" {unit}"


def _of(now: int, budget: Any) -> str:
    return f"{_memory.human(now)} of {_memory.human(budget)}" if budget else _memory.human(now)
