"""Text files: as much of them as some tokens can need, and an error that names the file."""

from __future__ import annotations

import codecs
from pathlib import Path

__all__ = ["decoded", "enough_bytes", "read_utf8"]


def enough_bytes(n_tokens: int) -> int:
    """Of a text, that hold so many tokens in most languages, and several times over: one is three to five of them.

    What is read of a text, and the list of its tokens, is in no budget; so who wants a few tokens of a long text takes so
    much of it, and more only if that was not enough.
    """
    return 16 * (n_tokens + 256)


def decoded(data: bytes, name: object, whole: bool = True) -> str:
    """UTF-8, with newlines as they are; `whole`: False where the data may end within a character.

    Raises:
        ValueError: it is something else; names the text and the byte.
    """
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 text (byte {e.start})") from e


def read_utf8(path: Path) -> str:
    """All of a file, with newlines as "\\n"; ValueError as by `decoded`."""
    return decoded(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")
