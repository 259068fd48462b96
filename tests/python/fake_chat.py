"""A model for the logic of the chat: a character is a token, and it says what it is told to say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from hobbit_cpp.cli.chat.conversation import Conversation
from hobbit_cpp.cli.chat.session import Chat
from hobbit_cpp.cli.chat.template import Template
from hobbit_cpp.cli.worker import Worker


class Cancelled(Exception):
    """What `FakeChatModel.cancel` makes of an evaluation."""


class FakeChatModel:
    """`says` are the answers in turn; an exception among them is raised. Reuses a common prefix as llama_cpp does."""

    model_path = "/models/fake.gguf"
    _is_recurrent = _is_hybrid = _requires_eval = False
    _chat_handlers: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, says: list[Any], n_ctx: int = 4096, system_role: bool = True, space: str = "", trims: bool = False
    ) -> None:
        self.says = says
        self.context = n_ctx
        self.system_role = system_role
        self.space = space  # that the template writes before an answer
        self.trims = trims  # the template, what is around it
        self.input_ids: list[int] = []
        self.evaluated: list[int] = []  # tokens, of each prompt
        self.prompts: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.slow = threading.Event()  # set: evaluations take until they are cancelled
        self.cancelled = threading.Event()

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    def n_ctx(self) -> int:
        return self.context

    def chat_handler(self, *, llama: Any, messages: list[dict[str, str]], **sampling: Any) -> Any:
        text = ""
        for m in messages:
            if m["role"] == "system" and not self.system_role:
                raise ValueError("no system role here")
            content = m["content"].strip() if self.trims else m["content"]
            text += {"system": "S:", "user": "U:", "assistant": "A:" + self.space}[m["role"]] + content + "|"
        return llama.create_completion(prompt=llama.tokenize((text + "A:").encode()), stop=["|", ""], **sampling)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [ord(c) for c in text.decode()]

    def detokenize(self, tokens: list[int], special: bool = False) -> bytes:
        return "".join(map(chr, tokens)).encode()

    def create_completion(self, *, prompt: list[int], stream: bool, **asked: Any) -> Iterator[dict[str, Any]]:
        assert stream and "" not in asked["stop"]
        self.asked.append(asked)
        self.prompts.append("".join(map(chr, prompt)))
        same = 0
        while same < min(len(prompt), self.n_tokens) and prompt[same] == self.input_ids[same]:
            same += 1
        self.input_ids = list(prompt[:same])
        if self.slow.is_set():
            self.cancelled.clear()
            assert self.cancelled.wait(30), "nobody cancelled"
            raise Cancelled
        self.evaluated.append(len(prompt) - same)
        self.input_ids = list(prompt)
        said = self.says.pop(0)
        if isinstance(said, BaseException):
            raise said
        for i, c in enumerate(said):
            if i > 0:
                self.input_ids.append(ord(said[i - 1]))
            if asked["max_tokens"] == i or self.n_tokens >= self.context:
                yield {"choices": [{"text": "", "finish_reason": "length"}]}
                return
            if c == "\x03":
                raise KeyboardInterrupt
            yield {"choices": [{"text": c, "finish_reason": None}]}
        self.input_ids += [ord(c) for c in said[-1:]]
        yield {"choices": [{"text": "", "finish_reason": "stop"}]}

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        pass


class Ears:
    """Hears what a chat says."""

    def __init__(self) -> None:
        self.said = ""
        self.notes: list[str] = []

    def text(self, piece: str) -> None:
        self.said += piece

    def note(self, text: str) -> None:
        self.notes.append(text)

    def reading(self, done: int, total: int) -> None:
        pass

    def answer(self, work: Any) -> None:
        work()


def chat_with(model: FakeChatModel, max_tokens: int | None = None, **more: Any) -> Chat:
    """A chat with it; `no_threads_left` closes its worker."""
    conversation = Conversation(more.pop("system", None))
    sampling = {"max_tokens": max_tokens}
    return Chat(
        model, Template(model), Worker(), lambda attempt: {**sampling, "seed": attempt}, False, conversation=conversation, **more
    )


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    made: list[Worker] = []
    init = Worker.__init__

    def remembered(self: Worker) -> None:
        init(self)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "__init__", remembered)
        yield
    for worker in made:
        worker.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("hobbit-model")]
