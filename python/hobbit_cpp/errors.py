"""Exceptions of hobbit_cpp, and the one table that maps a status of the C API to a class."""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Tuple, Type


class HobbitError(Exception):
    """Base class of everything that hobbit_cpp raises on purpose.

    Attributes:
        os_errno: errno of the failed system call, or None.
    """

    def __init__(self, message: str, os_errno: Optional[int] = None) -> None:
        super().__init__(message)
        self.message = message
        self.os_errno = os_errno
        if os_errno is not None and isinstance(self, OSError):
            for name, value in (("errno", os_errno), ("strerror", os.strerror(os_errno))):
                setattr(self, name, value)

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.message, self.os_errno), self.__dict__

    def __str__(self) -> str:
        return self.message  # an OSError with errno would print that alone


class ParameterError(HobbitError, ValueError):
    """A parameter is unknown or out of range."""


class ModelFileError(HobbitError, OSError, ValueError):
    """A model file cannot be opened. llama-cpp-python raises ValueError for one that is not there."""


class ModelFormatError(HobbitError, ValueError):
    """Not a GGUF, or a damaged or truncated one."""


class SidecarError(ModelFormatError):
    """The file with the low-precision copies is damaged, or belongs to another model."""


class NotMoeError(HobbitError, ValueError):
    """The model has no routed experts: there is nothing to offload. `Llama` warns and runs it as stock llama.cpp does."""


class TraceFormatError(HobbitError, ValueError):
    """Not a trace of routing, or one that contradicts itself."""


class CalibrationError(HobbitError, ValueError):
    """Not a calibration (`hobbit calibrate`), a damaged one, or one of another model."""


class ReadError(HobbitError, OSError):
    """Expert data could not be read while the model was running. The object stays usable."""


class MemoryBudgetError(HobbitError, MemoryError):
    """The memory budget is smaller than the smallest that works, or larger than what is there."""


class OutOfMemoryError(HobbitError, MemoryError):
    """The system refused an allocation."""


class UnsupportedModelError(HobbitError, NotImplementedError):
    """This model, or this use of it, cannot be offloaded."""


class StateError(HobbitError, RuntimeError):
    """The object was used before it was ready or after it was closed."""


class EvaluationCancelled(HobbitError):
    """`Llama.cancel` stopped this call. The object stays usable."""


class InternalError(HobbitError, RuntimeError):
    """A defect in hobbit_cpp."""


class HobbitWarning(UserWarning):
    """Something works, but not as well as it could."""


# hobbit_status of csrc/hobbit.h; a test shows that it is complete.
STATUS_TO_EXCEPTION: Dict[str, Type[HobbitError]] = {
    "HOBBIT_ERR_INVALID_ARGUMENT": ParameterError,
    "HOBBIT_ERR_FILE": ModelFileError,
    "HOBBIT_ERR_FORMAT": ModelFormatError,
    "HOBBIT_ERR_NOT_MOE": NotMoeError,
    "HOBBIT_ERR_READ": ReadError,
    "HOBBIT_ERR_BUDGET": MemoryBudgetError,
    "HOBBIT_ERR_NO_MEMORY": OutOfMemoryError,
    "HOBBIT_ERR_UNSUPPORTED": UnsupportedModelError,
    "HOBBIT_ERR_STATE": StateError,
    "HOBBIT_ERR_INTERNAL": InternalError,
    "HOBBIT_ERR_CANCELLED": EvaluationCancelled,
    "HOBBIT_ERR_SIDECAR": SidecarError,
}


def from_c(ffi: Any, lib: Any, error: Any) -> HobbitError:
    """The exception for a filled `hobbit_error *`."""
    message = ffi.string(error.message).decode("utf-8", "replace")
    by_number = {int(getattr(lib, name)): cls for name, cls in STATUS_TO_EXCEPTION.items()}
    cls = by_number.get(int(error.status), InternalError)
    return cls(message, int(error.os_errno) or None)
