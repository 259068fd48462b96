"""Text files: the same characters to each command, as many of them as some tokens can need, and an error that names the file."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import BinaryIO, Callable, Optional, Sequence, Tuple

__all__ = ["beginning_of", "checked", "common_prefix", "decoded", "enough_bytes", "first_tokens", "read_part", "read_whole"]

_CONTINUATION = bytes(range(0x80, 0xC0))


def decoded(data: bytes, name: object, whole: bool = True, at: int = 0) -> str:
    """UTF-8 without a byte order mark, and with newlines as "\\n".

    Args:
        whole: False where the data may end within a character.
        at: where in the text it begins.

    Raises:
        ValueError: it is something else; names the text and the byte.
    """
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) and at == 0 else 0
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[mark:], final=whole)
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 text (byte {at + mark + e.start})") from None
    zero = data.find(b"\0")
    if zero >= 0:  # UTF-16 has them
        raise ValueError(f"{name} is not UTF-8 text (byte {at + zero} is 0)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_whole(path: Path) -> str:
    """All of a file; ValueError as by `decoded`."""
    return decoded(path.read_bytes(), path)


def checked(text: str, name: object) -> str:
    """An argument of the command line, where Python keeps what is not UTF-8 as it is; ValueError when something is."""
    return decoded(text.encode("utf-8", "surrogateescape"), name)


def enough_bytes(n_tokens: int) -> int:
    """Of a text, that hold so many tokens in most languages, and several times over: one is three to five of them.

    What is read of a text, and the list of its tokens, is in no budget; so who wants a few tokens of a long text takes so
    much of it, and more only if that was not enough.
    """
    return 16 * (n_tokens + 256)


def read_part(file: BinaryIO, name: object, n_bytes: Optional[int], from_end: bool = False) -> Tuple[str, bool]:
    """The beginning of an open file, or its end, cut between characters; all of it for None. And whether it is all."""
    size = os.fstat(file.fileno()).st_size if from_end else 0
    cut = max(0, size - n_bytes) if from_end and n_bytes is not None else 0
    if cut:
        file.seek(cut)
    data = file.read(-1 if n_bytes is None else n_bytes)
    at = cut + len(data)
    if cut:
        data = data.lstrip(_CONTINUATION)
    at -= len(data)
    whole = not cut if from_end else n_bytes is None or len(data) < n_bytes
    return decoded(data, name, whole or from_end, at), whole


def beginning_of(text: str) -> Callable[[int], Tuple[str, bool]]:
    """Of a text that is in memory, for `first_tokens`."""
    return lambda size: (text[:size], size >= len(text))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


def first_tokens(tokenize: Callable[[str], Sequence[int]], part: Callable[[int], Tuple[str, bool]], n: int) -> Sequence[int]:
    """More than `n` tokens of a text, since the last of them may be of a character's half, or all that it has.

    Args:
        part: of so many bytes or characters, and whether that is all of the text.
    """
    size = enough_bytes(n)
    while True:
        text, whole = part(size)
        tokens = tokenize(text)
        if whole or len(tokens) > n:
            return tokens
        size *= 4
