"""What was said, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..output import write_json
from .template import Message

__all__ = ["Conversation", "load", "save"]

_FORMAT = "hobbit-chat"
_LARGEST = 64 << 20  # bytes of a file that may be a conversation


@dataclass
class Conversation:
    """Messages of user and assistant in turn.

    Attributes:
        system: the system message, or None.
        messages: all of them, the oldest first.
        first: where those begin that the model still sees; always a message of the user.
        unanswered: a message that got no answer, since it was stopped or failed: not among `messages`.
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    first: int = 0
    unanswered: str | None = None

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages, self.first, self.unanswered = [], 0, None

    def take_back(self) -> str | None:
        """The last message of the user, to be sent once more; it and its answer are forgotten. None: there is none."""
        if self.unanswered is not None:
            text, self.unanswered = self.unanswered, None
            return text
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.first = min(self.first, len(self.messages))
                return message["content"]
        return None


def save(path: Path, conversation: Conversation, model: str) -> None:
    """Writes the conversation as JSON: beside, and renamed when it is whole.

    Raises:
        ValueError: there is another kind of file already.
        OSError: it cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: make it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} exists and is not a saved conversation: choose another name")
    messages = list(conversation.messages)
    if conversation.unanswered is not None:
        messages.append({"role": "user", "content": conversation.unanswered})
    write_json(path, {"format": _FORMAT, "model": model, "system": conversation.system, "messages": messages})


def load(path: Path) -> Conversation:
    """The conversation in a file of `save`, or in a plain list of messages as the OpenAI API has it.

    Raises:
        ValueError: not a conversation, with the reason.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        data = _read(path)
    except ValueError as e:
        raise ValueError(f"{path} is not a saved conversation: {e}") from None
    system = None
    if isinstance(data, dict):
        system = data.get("system")
        if system is not None and not isinstance(system, str):
            raise ValueError(f"{path} is not a saved conversation: its system message is not a text")
        data = data.get("messages")
    if not isinstance(data, list):
        raise ValueError(f"{path} is not a saved conversation: it has no list of messages")
    messages: list[Message] = []
    for i, message in enumerate(data):
        role, content = _role_and_content(path, i, message)
        if role == "system" and i == 0 and system is None:
            system = content
            continue
        expected = "assistant" if len(messages) % 2 else "user"
        if role != expected:
            raise ValueError(f"{path}: message {i + 1} is of {role!r}, where one of {expected!r} was expected")
        messages.append({"role": role, "content": content})
    unanswered = messages.pop()["content"] if len(messages) % 2 else None
    return Conversation(system or None, messages, unanswered=unanswered)


def _read(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise ValueError("it is too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is too deep") from None


def _is_ours(path: Path) -> bool:
    try:
        data = _read(path)
    except (ValueError, OSError):
        return False
    return isinstance(data, dict) and data.get("format") == _FORMAT


def _role_and_content(path: Path, i: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{path}: message {i + 1} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{path}: message {i + 1} has no role and content in text")
    return role, content
