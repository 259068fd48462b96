"""hobbit-cpp: Mixture-of-Experts GGUF models larger than memory, through llama.cpp.

>>> from hobbit_cpp import Llama
>>> llm = Llama("model.gguf", offload="hobbit", memory="4GiB")

`Llama` is llama-cpp-python's class with one more argument. Everything is imported at first use, so that
`import hobbit_cpp` is quick and loads no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

from . import _lib

if TYPE_CHECKING:
    from .errors import (
        CalibrationError,
        EvaluationCancelled,
        HobbitError,
        HobbitWarning,
        MemoryBudgetError,
        ModelFileError,
        ModelFormatError,
        NotMoeError,
        OutOfMemoryError,
        ParameterError,
        ReadError,
        SidecarError,
        StateError,
        TraceFormatError,
        UnsupportedModelError,
    )
    from .llama import Llama
    from .params import OffloadParams
    from .stats import LayerCounts, OffloadCounts, OffloadStats

__version__ = _lib.version

__all__ = [
    "CalibrationError",
    "EvaluationCancelled",
    "HobbitError",
    "HobbitWarning",
    "LayerCounts",
    "Llama",
    "MemoryBudgetError",
    "ModelFileError",
    "ModelFormatError",
    "NotMoeError",
    "OffloadCounts",
    "OffloadParams",
    "OffloadStats",
    "OutOfMemoryError",
    "ParameterError",
    "ReadError",
    "SidecarError",
    "StateError",
    "TraceFormatError",
    "UnsupportedModelError",
]

_HOME = {
    "Llama": "llama",
    "OffloadParams": "params",
    "OffloadStats": "stats",
    "OffloadCounts": "stats",
    "LayerCounts": "stats",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hobbit_cpp' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
