"""Files that commands write: checked before the work, written beside and renamed when whole."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Optional

__all__ = ["check_writable", "write_json", "write_text"]


def check_writable(path: Optional[Path]) -> None:
    """An hour of work must not end in a file that cannot be written.

    Raises:
        ValueError: there is no such folder.
    """
    if path is not None and str(path) != "-" and (not path.parent.is_dir() or path.is_dir()):
        raise ValueError(f"{path} cannot be written: name a file in a folder that there is")


def write_text(path: Path, text: str) -> None:
    """The whole file or none; "-" is stdout."""
    if str(path) == "-":
        sys.stdout.write(text)
        return
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
