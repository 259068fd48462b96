"""llama.cpp's log: printed when verbose; else its errors become part of the exception, and nothing is printed.

llama.cpp says why something failed in its log only, in several lines; the exceptions of llama-cpp-python say that it failed.
(Its own log function takes llama.cpp's levels for others: warnings are printed when nothing should be, errors are not.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import logging
import os
import re
import sys
import threading
from types import CodeType
from typing import Any, Callable, Iterator, List, Optional, Set

from .errors import HobbitError, ModelFormatError, OutOfMemoryError, ReadError

# ggml_log_level; 5 continues the line before.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_MOST_KEPT = 20

_thread = threading.local()  # .level: of the line before; since errors_explained() was entered .errors: lines; .interrupted
_callback: Any = None  # kept alive for llama.cpp

CALLBACKS: Set[CodeType] = set()
"""What llama.cpp calls: an exception that begins in these, before anything in them can keep it, is printed and gone."""


def install(c: Any) -> None:
    """Puts ours in the place of llama-cpp-python's log function. `c`: the module llama_cpp.llama_cpp."""
    global _callback
    logger = importlib.import_module("llama_cpp._logger").logger  # its level is what verbose= sets

    def log(level: int, text: bytes, data: Any) -> None:
        with _interrupt_kept():
            take(level, text)

    def take(level: int, text: bytes) -> None:
        _thread.level = _LEVELS.get(level, getattr(_thread, "level", logging.INFO))
        if logger.level < logging.ERROR:
            if _thread.level >= logger.level:
                print(text.decode("utf-8", "replace"), end="", flush=True, file=sys.stderr)
            return
        errors: List[str] = getattr(_thread, "errors", [])
        if _thread.level == logging.ERROR and len(errors) < _MOST_KEPT:
            errors.append(text.decode("utf-8", "replace"))

    CALLBACKS.add(log.__code__)
    _callback = c.llama_log_callback(log)
    c.llama_log_set(_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def _interrupt_kept() -> Iterator[None]:
    """Around the body of a callback of llama.cpp, out of which no exception comes: Ctrl-C is kept for errors_explained()."""
    try:
        yield
    except KeyboardInterrupt:
        _thread.interrupted = True


def _interrupted() -> bool:
    return bool(getattr(_thread, "interrupted", False))


def stoppable(progress: Optional[Callable[[float], bool]]) -> Callable[[float, Any], bool]:
    """A callback for llama.cpp's loading, which goes on while it is true: until `progress` is false, or Ctrl-C came."""

    def go_on(done: float, data: Any) -> bool:
        more = False
        with _interrupt_kept():
            more = progress is None or bool(progress(done))
        return more and not _interrupted()

    CALLBACKS.add(go_on.__code__)
    return go_on


def _reason(errors: List[str]) -> str:
    """The first error is the cause; the others say who gave up because of it."""
    line = " ".join(errors[0].split())
    return re.sub(r"^(\w+: )+(error loading model: )?(\w+: )*", "", line)


def _load_error(message: str, reason: str) -> HobbitError:
    """By what the reason says: llama.cpp has no error codes."""
    for number in errno.errorcode:
        if reason.endswith(f"error: {os.strerror(number)}"):
            return ReadError(message, number)
    if "end of file" in reason:
        return ReadError(message)
    return OutOfMemoryError(message) if "failed to allocate" in reason else ModelFormatError(message)


@contextlib.contextmanager
def errors_explained(path: str) -> Iterator[None]:
    """Around calls of llama.cpp on the model `path`: exceptions of llama-cpp-python get the reason from the log."""
    errors: List[str] = []
    _thread.errors = errors
    _thread.interrupted = False
    try:
        yield
        if _interrupted():
            raise KeyboardInterrupt
    except (ValueError, RuntimeError) as e:
        if _interrupted():
            raise KeyboardInterrupt from e
        if not errors or isinstance(e, HobbitError):
            raise
        if "Failed to load model" in str(e):
            raise _load_error(f"{path}: llama.cpp cannot load it: {_reason(errors)}", _reason(errors)) from e
        kind = RuntimeError if isinstance(e, RuntimeError) else ValueError  # not of its subclass: who knows what that is made of
        raise kind(f"{e}: {_reason(errors)}") from e
