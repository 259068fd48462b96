"""How commands write: to stdout, to JSON files, and errors in one line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

__all__ = ["check_writable", "one_line", "write_json", "write_stdout", "write_whole"]


def write_stdout(text: str) -> None:
    """At once, whatever the encoding of the terminal."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def check_writable(path: Optional[Path]) -> None:
    """An hour of work must not end in a file that cannot be written. None and "-" (stdout) can.

    Raises:
        ValueError: there is no such folder, or the path is one.
    """
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is not a folder: make it first")


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
    # /dev/stdout is a name of whatever file stdout goes to, which must be neither replaced nor emptied
    if str(path.absolute()).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file()):
        with open(path, "a", encoding="utf-8") as out:
            out.write(text)
        return
    path = path.resolve()
    fd, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(text)
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
            os.fchmod(f.fileno(), mode)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def one_line(e: BaseException) -> str:
    """What an error says, for people, without a line break."""
    text = " ".join(str(e).split())
    if not text or isinstance(e, (KeyError, IndexError, AttributeError, TypeError, AssertionError)):
        # nothing written for people
        text = f"{type(e).__name__}: {text} (HOBBIT_DEBUG=1 shows where)"
    if "exceed context window" in text:
        text += ": -c N makes it larger"
    return text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
