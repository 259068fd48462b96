"""Models that tests share: made once, kept in a cache folder outside of the clone."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import tiny_models
from hobbit_cpp.convert import convert


@functools.cache
def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # What the models are made by is part of the name: a change of the generator makes new ones.
    made_by = hashlib.sha256(Path(tiny_models.__file__).read_bytes()).hexdigest()[:12]
    folder = Path(base) / "hobbit-cpp" / "test-models" / made_by
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def tiny(shape: str, expert_type: str = "F16") -> Path:
    """A random model of a few MB with the routing of `shape`."""
    path = cache_dir() / f"{shape}-{expert_type.lower()}.gguf"
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        tiny_models.write_tiny(partial, shape, expert_type=expert_type)
        partial.rename(path)
    return path


@functools.cache
def tiny_dual(shape: str, high: str = "Q8_0", low: str = "Q4_0") -> Path:
    """The same with a low-precision copy of each expert."""
    path = cache_dir() / f"{shape}-{high.lower()}-{low.lower()}.gguf"
    if not path.is_file():
        convert(tiny(shape), path, high=high, low=low, progress=False)
    return path
