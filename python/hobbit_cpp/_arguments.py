"""What `Llama` is given, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import warnings
from typing import Any, Callable, Dict, Iterable, Set

from ._memory import MOST_THREADS
from .errors import HobbitWarning, ModelFileError, ModelFormatError, ParameterError
from .params import OffloadParams

_REFUSED = {
    "use_mlock": "the expert pool and the dense weights are in anonymous memory already",
    "vocab_only": "there are no experts to offload in a vocabulary",
}


def check_without_offload(**ours: Any) -> None:
    """Arguments of ours that are set say that offload was meant. False or "none", where that means nothing, is not set.

    Raises:
        ParameterError: some are.
    """
    may_be_none = ("low_model", "calibration")
    given = [k for k, v in ours.items() if v is not None and v is not False and not (k in may_be_none and v == "none")]
    if given:
        raise ParameterError(f"{', '.join(given)} needs an offload: 'hobbit', 'fate' or 'lru'")


def check_with_offload(path: str, kwargs: Dict[str, Any], ours: Iterable[str], upstream: Callable[..., Any]) -> None:
    """What goes on to llama-cpp-python's class. That ignores names that it does not know, which other programs rely on
    (LangChain passes arguments of years ago); a misspelt memory limit must not be ignored.

    Args:
        ours: names of our arguments.
        upstream: the constructor whose arguments are known as well.

    Raises:
        ParameterError: an argument that is nearly one of ours, or that does not go with offload.
        ModelFileError, ModelFormatError: a file that is not there, or an adapter that is none.
    """
    known = {*ours, *inspect.signature(upstream).parameters}
    unknown = [name for name in kwargs if name not in known]
    for name in unknown:
        _check_ours(name, known, set(ours))
    if unknown:
        warnings.warn(
            f"Llama has no argument {', '.join(unknown)}: ignored, as llama-cpp-python does", HobbitWarning, stacklevel=3
        )
    for name, why in _REFUSED.items():
        if kwargs.get(name):
            raise ParameterError(f"{name}=True does not go with offload: {why}")
    for name in ("n_threads", "n_threads_batch"):
        n = kwargs.get(name)
        if n is not None and not 0 <= n <= MOST_THREADS:
            raise ParameterError(f"{name}={n}: llama.cpp takes at most {MOST_THREADS} threads; one a core is best")
    if not os.path.exists(path):
        raise ModelFileError(f"there is no file {path}")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFileError(
            f"{path!r}: llama.cpp opens files by names in UTF-8 alone: rename it, or make a link to it"
        ) from None
    if kwargs.get("lora_path"):
        _check_lora(kwargs["lora_path"])


# llama.cpp reads a grammar by recursion: 20,000 groups in one another overrun its stack.
_DEEPEST = 2000
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')


def check_depth(grammar: str) -> None:
    """ValueError when groups of a grammar (GBNF) stand too deep in one another."""
    depth = 0
    for bracket in re.findall(r"[()]", _LITERALS.sub("", grammar)):
        depth += 1 if bracket == "(" else -1
        if depth > _DEEPEST:
            raise ValueError(f"the grammar has more than {_DEEPEST} groups in one another: limit repetitions (maxItems) to fewer")


def _check_ours(name: str, known: Set[str], ours: Set[str]) -> None:
    """ParameterError when an unknown name stands for something about the offload."""
    if name in {field.name for field in dataclasses.fields(OffloadParams)}:
        raise ParameterError(f"{name} is one of OffloadParams: offload=OffloadParams({name}=...)")
    close = difflib.get_close_matches(name, known, 1)
    if close and close[0] in ours:
        raise ParameterError(f"Llama has no argument {name!r}: is {close[0]!r} meant?")


def _check_lora(path: str) -> None:
    """Raises what says more than llama.cpp when an adapter cannot be read."""
    from .convert.errors import ConvertError
    from .convert.header import read_header

    try:
        with open(path, "rb") as file:
            read_header(file, path, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise ModelFileError(f"there is no file {path} (lora_path)") from None
    except ConvertError as e:
        raise ModelFormatError(str(e)) from e
