"""From messages to tokens: the model's chat template, and the tokens that the context holds already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Dict

from ..._texts import common_prefix

__all__ = ["Message", "PlainText", "Prompt", "Template", "respell"]

# {"role": "user" or "assistant" or "system", "content": text}
Message = Dict[str, str]

_PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Assistant:{{ m['content'] }}\n{% endif %}"
    "{% endfor %}Assistant:"
)
_PLAIN_STOP = ["\nUser:"]
# No character of any text; taken out before the tokenizer.
_GUARD = "\ufdd0"


@dataclass(frozen=True)
class Prompt:
    """What to evaluate, and the further arguments of `create_completion`."""

    tokens: list[int]
    options: dict[str, Any]


class Template:
    """The chat template of a model, through llama_cpp's chat handlers.

    Attributes:
        note: what the user should know about it, or None.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pieces: dict[int, bytes] = {}
        self._stop: list[str] = []
        self._system_role: bool | None = None  # not known yet
        self.note: str | None = None
        self._handler = model.chat_handler or model._chat_handlers.get("chat_template.default")
        if self._handler is None:
            self._use_plain("this model has no chat template")
            return
        try:
            self._ask([{"role": "user", "content": "x"}], {})
        except Exception as e:
            self._use_plain(f"the chat template of this model fails ({' '.join(str(e).split())})")

    def _use_plain(self, why: str) -> None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        model = self._model
        eos, bos = model.token_eos(), model.token_bos()
        self._handler = Jinja2ChatFormatter(
            template=_PLAIN,
            eos_token=model._model.token_get_text(eos) if eos != -1 else "",
            # where the tokenizer wants none, there is none
            bos_token=model._model.token_get_text(bos) if bos != -1 and model._model.add_bos_token() else "",
            stop_token_ids=[eos],
        ).to_chat_handler()
        self._stop = _PLAIN_STOP
        self._system_role = True
        self.note = f"{why}: a plain one is used (User: ... Assistant: ...)"

    def prompt(self, system: str | None, messages: Sequence[Message], sampling: dict[str, Any]) -> Prompt:
        """The tokens of the conversation, up to where the model answers.

        Raises:
            ValueError: the template refuses the messages.
        """
        held = self._evaluated()

        def ask(messages: list[Message]) -> tuple[int, list[int], dict[str, Any]]:
            asked = self._ask(self._with_system(system, messages), sampling)
            tokens = respell(held, asked["prompt"], self._piece)
            return common_prefix(held, tokens), tokens, asked

        same, tokens, asked = ask(list(messages))
        # A template may strip the space that an answer began with, or write one of its own: then the answer would have to be
        # evaluated again for that.
        for change in (_guarded, _stripped):
            if same < len(held):
                other = ask([change(m) if m["role"] == "assistant" else m for m in messages])
                if other[0] > same:
                    same, tokens, asked = other
        # an empty stop, of a vocabulary without end token, would end each answer at once
        asked["stop"] = [s for s in [*(asked.get("stop") or []), *self._stop] if s]
        for name in ("prompt", "stream"):
            del asked[name]
        return Prompt(tokens, asked)

    def _with_system(self, system: str | None, messages: list[Message]) -> list[Message]:
        if not system:
            return messages
        if self._system_role is None:
            self._system_role = self._knows_system()
        if self._system_role:
            return [{"role": "system", "content": system}, *messages]
        # some templates have no such role: what it says then goes before the first message
        first = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]]

    def _knows_system(self) -> bool:
        probe = "hobbit-system-probe"
        try:
            asked = self._ask([{"role": "system", "content": probe}, {"role": "user", "content": "x"}], {})
        except Exception:
            return False
        return probe.encode() in self._model.detokenize(asked["prompt"])

    def _ask(self, messages: list[Message], sampling: dict[str, Any]) -> dict[str, Any]:
        """What the chat handler asks the model for."""
        recorder = _Recorder(self._model)
        self._handler(llama=recorder, messages=messages, stream=True, **sampling)
        return recorder.asked

    def _evaluated(self) -> list[int]:
        return [int(t) for t in self._model.input_ids[: self._model.n_tokens]]

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            # tokens without a text of their own must not look alike
            piece = self._model.detokenize([token], special=True) or b"\0%d\0" % token
            self._pieces[token] = piece
        return piece


class PlainText:
    """No template and no history: each message is a text to continue."""

    note: str | None = None

    def __init__(self, model: Any) -> None:
        self._model = model

    def prompt(self, system: str | None, messages: Sequence[Message], sampling: dict[str, Any]) -> Prompt:
        """The tokens of the last message."""
        return Prompt(self._model.tokenize(messages[-1]["content"].encode(), add_bos=True, special=True), dict(sampling))


class _Recorder:
    """Stands in for the model in a chat handler: keeps what would be asked, and asks nothing."""

    verbose = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.asked: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokenize(self, text: bytes, *args: Any, **kwargs: Any) -> Any:
        return self._model.tokenize(text.replace(_GUARD.encode(), b""), *args, **kwargs)

    def create_completion(self, **asked: Any) -> Iterator[dict[str, Any]]:
        self.asked = asked
        return iter(())


def respell(evaluated: Sequence[int], wanted: Sequence[int], piece: Callable[[int], bytes]) -> list[int]:
    """`wanted`, its beginning spelled in the tokens that are evaluated already, as far as the text is the same.

    An answer, tokenised as a part of the next prompt, often comes out in other tokens than the model chose. Evaluating these
    again would be slow, and not what the model said.

    Args:
        evaluated: tokens in the context.
        wanted: tokens of the next prompt.
        piece: the text of a token, never empty.
    """
    i = j = kept = same = common_prefix(evaluated, wanted)
    ours = theirs = b""  # read, and not yet found in the other
    while True:
        if not ours and not theirs:
            kept, same = i, j
        if not ours:
            if i == len(evaluated):
                break
            ours = piece(evaluated[i])
            i += 1
        elif not theirs:
            if j == len(wanted):
                break
            theirs = piece(wanted[j])
            j += 1
        n = min(len(ours), len(theirs))
        if ours[:n] != theirs[:n]:
            break
        ours, theirs = ours[n:], theirs[n:]
    return [*evaluated[:kept], *wanted[same:]]


def _guarded(message: Message) -> Message:
    """Its outer spaces pass through a template that trims."""
    return {**message, "content": f"{_GUARD}{message['content']}{_GUARD}"}


def _stripped(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}
