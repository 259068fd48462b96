"""How commands write: to stdout, to JSON files, and errors in one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Optional

from .._files import replacing

__all__ = ["check_writable", "debugging", "one_line", "write_json", "write_stdout", "write_whole"]


def write_stdout(text: str) -> None:
    """At once, whatever the encoding of the terminal."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def check_writable(path: Optional[Path], *inputs: Optional[Path], text: bool = True) -> None:
    """An hour of work must not end in a file that cannot be written, nor in the loss of another. None and "-" (stdout) can be.

    Args:
        inputs: what is read; None: nothing.
        text: what will be written is text, which replaces text alone: no model, and no trace.

    Raises:
        ValueError: there is no such folder, nothing may be written in it, the path is a folder, one of the inputs, or a file of
            another kind.
    """
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    if _is_stream(path):
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is not a folder: make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no files can be made in {folder}")
    if path.exists():
        if any(given is not None and given.exists() and given.samefile(path) for given in inputs):
            raise ValueError(f"{path} is read, and would be replaced: name another file")
        if text and _is_binary(path):
            raise ValueError(f"{path} is not text, and would be replaced: name another file")


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(1024)


def write_json(path: Path, data: Any) -> None:
    """As `write_whole`.

    Raises:
        OSError: it cannot be written; what was there before still is.
        ValueError: a number is not finite, which JSON does not know.
    """
    write_whole(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The whole file or none: written beside and renamed. "-" is stdout.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    if str(path) == "-":
        write_stdout(text)
        return
    if _is_stream(path):
        with open(path, "a", encoding="utf-8") as out:
            out.write(text)
        return
    with replacing(path) as partial:
        # what is not text in a file name is an escape in JSON
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _is_stream(path: Path) -> bool:
    """A device, a pipe, or a name of an open file such as /dev/stdout, which must be neither replaced nor emptied."""
    return str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/")) or (path.exists() and not path.is_file())


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("HOBBIT_DEBUG", "") not in ("", "0")


def one_line(e: BaseException) -> str:
    """What an error says, for people, without a line break."""
    text = " ".join(str(e).split())
    if not text or isinstance(e, (KeyError, IndexError, AttributeError, TypeError, AssertionError)):
        # nothing written for people
        text = f"{type(e).__name__}: {text} (HOBBIT_DEBUG=1 shows where)"
    if "exceed context window" in text:
        text += ": -c N makes it larger"
    return text
