"""Calibration text and a byte-level BPE tokenizer, so that numpy is enough."""

from __future__ import annotations

import ast
import re
import sysconfig
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .transformer import IntArray


def _byte_alphabet() -> dict[int, str]:
    """Map each byte to the printable character that GPT-2 vocabularies use."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    spare = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + i) for i, byte in enumerate(spare)})
    return table


def _char_class(text: str, major: str) -> str:
    """Regex class body of the characters of ``text`` in a Unicode major category.

    The standard ``re`` module lacks ``\\p{L}``; listing only the characters that
    occur keeps the class exact and short.
    """
    found = sorted({c for c in set(text) if unicodedata.category(c)[0] == major})
    # A class may not be empty: fall back on a character that is in every vocabulary
    # of the category anyway.
    return "".join(map(re.escape, found)) or ("a" if major == "L" else "0")


class Tokenizer:
    """Byte-level BPE with the ``smollm`` pre-tokenizer (special tokens not parsed)."""

    def __init__(self, tokens: Iterable[str], merges: Iterable[str]) -> None:
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            self._ranks[left, right] = rank
        self._bytes = _byte_alphabet()
        self._cache: dict[str, list[int]] = {}

    def _word(self, word: str) -> list[int]:
        """Token ids of one pre-token."""
        known = self._cache.get(word)
        if known is not None:
            return known
        parts = [self._bytes[byte] for byte in word.encode()]
        unranked = len(self._ranks)
        while len(parts) > 1:
            ranks = [self._ranks.get((parts[i], parts[i + 1]), unranked) for i in range(len(parts) - 1)]
            best = min(ranks)
            if best == unranked:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids = [self._ids[part] for part in parts if part in self._ids]
        self._cache[word] = ids
        return ids

    def encode(self, text: str) -> IntArray:
        """Token ids of ``text``: int64, shape (tokens,)."""
        letter, number = _char_class(text, "L"), _char_class(text, "N")
        # llama.cpp applies the expressions one after the other: digits are cut out
        # one by one first, and what no expression matches is a piece of its own.
        digits = re.compile(f"([{number}])")
        pieces = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[^\\s{letter}{number}]+|\\s+(?!\\S)")
        ids: list[int] = []
        for fragment in digits.split(text):
            end = 0
            for match in pieces.finditer(fragment):
                if match.start() > end:
                    ids += self._word(fragment[end : match.start()])
                ids += self._word(match.group())
                end = match.end()
            if end < len(fragment):
                ids += self._word(fragment[end:])
        return np.array(ids, dtype=np.int64)


def _docstrings(folder: Path) -> Iterable[str]:
    """Docstrings of the modules directly in ``folder``, in name order."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node)
                # One-liners are mostly signatures; prose is what calibrates well.
                if doc and len(doc) > 200:
                    yield doc


def default_text(min_chars: int) -> str:
    """English text that comes with Python: the help topics, then docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems leave it out
        parts = []
    else:
        parts = [topics[name] for name in sorted(topics)]
    size = sum(map(len, parts))
    if size < min_chars:
        for doc in _docstrings(Path(sysconfig.get_paths()["stdlib"])):
            parts.append(doc)
            size += len(doc)
            if size >= min_chars:
                break
    return "\n\n".join(parts)


def split(ids: IntArray, length: int, n_fit: int, n_held: int) -> tuple[IntArray, IntArray]:
    """Cut a token stream into calibration and held-out sequences.

    The held-out part is the end of the stream; the calibration sequences are spread
    evenly over the rest, so that few of them still see every subject.

    Returns:
        Two int64 arrays, (sequences, length) each. Fewer calibration sequences
        than asked for when the text is short.
    """
    total = len(ids) // length
    if total < 2:
        raise ValueError(f"the corpus has {len(ids)} tokens; at least {2 * length}")
    n_held = max(1, min(n_held, total // 4))
    sequences = ids[: total * length].reshape(total, length)
    pool = sequences[: total - n_held]
    chosen = np.linspace(0, len(pool) - 1, min(n_fit, len(pool))).round().astype(int)
    return pool[chosen], sequences[total - n_held :]
