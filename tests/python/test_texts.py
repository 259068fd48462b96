"""Text files: every command reads the same characters out of one, and no more than it needs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hobbit_cpp._texts import beginning_of, checked, decoded, enough_bytes, first_tokens, read_part, read_whole


def test_marks_and_newlines_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffcafé\r\nau\rlait\n".encode())
    assert read_whole(path) == "café\nau\nlait\n"
    assert checked("caf\u00e9", "-p") == "café"
    with pytest.raises(ValueError, match=r"^x is not UTF-8 text \(byte 3\)$"):
        decoded(b"caf\xe9", "x")
    with pytest.raises(ValueError, match=r"^x is not UTF-8 text \(byte 6\)$"):
        decoded(b"\xef\xbb\xbfcaf\xe9", "x")
    with pytest.raises(ValueError, match=r"^x is not UTF-8 text \(byte 3\)$"):
        checked("caf\udce9", "x")


@given(
    st.text(st.characters(blacklist_characters="\0\r\ufeff", blacklist_categories=["Cs"]), max_size=40),
    st.integers(0, 80),
    st.booleans(),
)
def test_a_part_is_cut_between_characters(text: str, n: int, from_end: bool) -> None:
    data = text.encode()
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        part, whole = read_part(file, "text", n, from_end)
    assert text.endswith(part) if from_end else text.startswith(part)
    if whole:
        assert part == text
    else:
        assert n - 3 <= len(part.encode()) <= n <= len(data)


def test_a_part_of_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait" * 100)
    for n, from_end in ((100, False), (100, True), (None, False), (None, True)):
        with open(path, "rb") as file, pytest.raises(ValueError, match="is not UTF-8 text"):
            read_part(file, path, n, from_end)


@pytest.mark.parametrize("from_end", [False, True])
def test_two_bytes_a_character_are_no_text(tmp_path: Path, from_end: bool) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("utf-16-le", "utf-16"):
        path.write_text("text " * 100, encoding=encoding)
        with open(path, "rb") as file, pytest.raises(ValueError, match="is not UTF-8 text"):
            read_part(file, path, 100, from_end)


def test_the_place_of_what_is_no_text_is_that_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("é" * 2500).encode() + b"abc\xe9abc")
    for n in (51, 50):  # a cut through a character, and between two
        with open(path, "rb") as file, pytest.raises(ValueError, match=r"\(byte 5003\)$"):
            read_part(file, path, n, from_end=True)


def test_the_first_tokens_of_a_long_text() -> None:
    asked: List[int] = []

    def tokenize(text: str) -> List[int]:
        asked.append(len(text))
        return [0] * (len(text) // 100)  # a language of long words

    few = first_tokens(tokenize, beginning_of("x" * 10_000_000), 1000)
    assert len(few) > 1000 and asked == [enough_bytes(1000) * 4**i for i in range(len(asked))] and max(asked) < 1_000_000
    assert len(first_tokens(tokenize, beginning_of("x" * 500), 1000)) == 5
