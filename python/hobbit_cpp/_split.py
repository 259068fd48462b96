"""Names of the parts of a split model, as llama.cpp writes and reads them: model-00001-of-00003.gguf."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["MAX_PARTS", "base_name", "is_part", "part_paths"]

# split.count is an unsigned 16-bit number.
MAX_PARTS = 0xFFFF

_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.DOTALL)


def is_part(path: Path, count: int | None = None) -> bool:
    """Whether this is the name of a part (of so many)."""
    name = _PART.match(path.name)
    return name is not None and (count is None or int(name["count"]) == count)


def base_name(path: Path) -> str:
    """The name of a model without what tells its parts apart, and without `.gguf`."""
    name = _PART.match(path.name)
    if name is not None:
        return name["stem"]
    return path.name[:-5] if path.name.lower().endswith(".gguf") else path.name


def part_paths(path: Path, count: int) -> list[Path]:
    """The names of all `count` parts, beside `path`, which is any of them or what they are parts of."""
    stem = base_name(path)
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
