"""Turns of a conversation with a model: what is sent, what is dropped when the context is full, what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..._texts import common_prefix
from ..generate import Answer, cancel_of, completion_pieces, measure
from ..worker import Worker
from .conversation import Conversation
from .template import Prompt

__all__ = ["Chat", "Listener", "TooLongError", "Turn"]

# What an answer should find free when -n does not say, and the least that makes a turn worth beginning.
_ROOM = 512
_LEAST_ROOM = 16


class TooLongError(ValueError):
    """A message that does not fit into the context, alone as it is."""


class Listener(Protocol):
    """Is told how a turn goes."""

    def text(self, piece: str) -> None:
        """A piece of the answer."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def reading(self, done: int, total: int) -> None:
        """Tokens of the prompt: now and then, until the answer begins."""


@dataclass(frozen=True)
class Turn:
    """What came of a message.

    Attributes:
        text: the answer.
        answer: its measures; `answer.prompt.tokens` are those that were evaluated, without the reused ones.
        reused: tokens of the prompt that were in the context already.
        context: tokens in the context now.
    """

    text: str
    answer: Answer
    reused: int
    context: int


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        model: hobbit_cpp.Llama.
        template: makes prompts: `Template` or `PlainText`.
        sampling: called for each answer; with the number of the attempt at it, from 0.
        offload: whether the model has statistics of the offload.
        history: whether the model sees earlier turns.
    """

    model: Any
    template: Any
    worker: Worker
    sampling: Callable[[int], dict[str, Any]]
    offload: bool
    history: bool = True
    conversation: Conversation = field(default_factory=Conversation)
    turns: list[Turn] = field(default_factory=list)
    _attempt: int = 0

    def send(self, text: str, listener: Listener) -> Turn:
        """Answers a message. If that is stopped before the first word, or fails, it waits for `retry`.

        Raises:
            TooLongError: it does not fit; nothing changed.
            HobbitError, ...: the model failed.
        """
        self._attempt = 0
        if not self.history:
            self.conversation.reset()
        before = self.conversation.unanswered
        try:
            return self._send(text, listener)
        except TooLongError:
            self.conversation.unanswered = before
            raise

    def retry(self, listener: Listener) -> Turn | None:
        """Another answer to the last message. None: there is no message. The old answer stays until the new one has begun."""
        talk = self.conversation
        messages, first = [*talk.messages], talk.first
        text = talk.take_back()
        if text is None:
            return None
        self._attempt += 1
        answered = len(talk.messages) < len(messages)
        begun = False
        try:
            turn = self._send(text, listener)
            begun = bool(turn.text) or not turn.answer.interrupted
            return turn
        finally:
            if answered and not begun:
                talk.messages, talk.first, talk.unanswered = messages, first, None

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return int(self.model.n_ctx())

    def _send(self, text: str, listener: Listener) -> Turn:
        talk = self.conversation
        talk.unanswered = text
        before = len(talk.messages)
        talk.messages.append({"role": "user", "content": text})
        try:
            turn = self._answer(self._fitting(listener), listener)
        except BaseException:
            del talk.messages[before:]
            raise
        self.turns.append(turn)
        if turn.answer.interrupted and not turn.text:
            del talk.messages[before:]
        else:
            talk.messages.append({"role": "assistant", "content": turn.text})
            talk.unanswered = None
        return turn

    def _answer(self, prompt: Prompt, listener: Listener) -> Turn:
        model = self.model
        reused = self._reused(prompt.tokens)
        parts: list[str] = []

        def write(piece: str) -> None:
            # after some templates the first word has a space before it, or a newline
            shown = piece if "".join(parts).strip() else piece.lstrip()
            parts.append(piece)
            if shown:
                listener.text(shown)

        def tick() -> None:
            if not parts:
                listener.reading(max(model.n_tokens - reused, 0), len(prompt.tokens) - reused)

        pieces = completion_pieces(model.create_completion(prompt=prompt.tokens, stream=True, **prompt.options))
        with self.worker.stoppable(cancel_of(model)):
            answer = measure(model, self.worker.each(pieces, tick), write, self.offload, reused)
        self._say_how_it_ended(answer, prompt, listener)
        return Turn("".join(parts), answer, reused, model.n_tokens)

    def _say_how_it_ended(self, answer: Answer, prompt: Prompt, listener: Listener) -> None:
        if answer.interrupted or answer.finish_reason != "length":
            return
        # the last token was chosen, and not evaluated
        if self.model.n_tokens + 1 >= self.n_ctx:
            listener.note(f"the answer was cut off: the context of {self.n_ctx} tokens is full")
        else:
            listener.note(f"the answer was cut off after {prompt.options['max_tokens']} tokens (-n)")

    def _reused(self, tokens: list[int]) -> int:
        """Tokens that `Llama.generate` will not evaluate again."""
        model = self.model
        held = model.n_tokens
        same = common_prefix(model.input_ids[:held], tokens)
        if same < held and (model._is_recurrent or model._is_hybrid):
            return 0  # their state cannot go back
        if same == len(tokens) and (same < held or model._requires_eval):
            return same - 1  # the last one once more, for its logits
        return same

    def _fitting(self, listener: Listener) -> Prompt:
        """The prompt, without the oldest turns when it is too long."""
        talk, n_ctx = self.conversation, self.n_ctx
        first = talk.first
        sampling = self.sampling(self._attempt)
        room = min(sampling["max_tokens"] or _ROOM, n_ctx // 4)

        def build() -> Prompt:
            return self.template.prompt(talk.system, talk.messages[first:], sampling)  # type: ignore[no-any-return]

        prompt = build()
        if len(prompt.tokens) + room > n_ctx:
            # Some more than must be: what was dropped moves all the rest, and the model has to read that again.
            while len(prompt.tokens) + n_ctx // 4 > n_ctx and first + 2 < len(talk.messages):
                first += 2
                prompt = build()
            if len(prompt.tokens) + min(room, _LEAST_ROOM) > n_ctx:
                with_ = " with the system message" if talk.system else ""
                raise TooLongError(
                    f"the message is too long: it takes {len(prompt.tokens)} tokens{with_}, and the context has {n_ctx} "
                    "(-c), some of them for the answer; nothing was sent"
                )
            if first > talk.first:
                listener.note(
                    f"the context of {n_ctx} tokens is full: the model no longer sees the "
                    + (f"{first} oldest messages" if first > 1 else "oldest message")
                )
                talk.first = first
        return prompt
