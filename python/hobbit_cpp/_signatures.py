"""A subclass that says of its methods what the class above it says: for editors, and for programs that look."""

from __future__ import annotations

import inspect
from typing import Any, Tuple

__all__ = ["own_arguments", "sign_as"]


def own_arguments(cls: Any) -> Tuple[str, ...]:
    """Of the constructor, between its first argument and its **kwargs."""
    return tuple(inspect.signature(cls).parameters)[1:-1]


def sign_as(cls: Any, upstream: Any) -> None:
    """Overriding methods have the arguments and the docstring of what they override; the constructor has its own besides."""
    for name, function in vars(cls).items():
        above = vars(upstream).get(name)
        if inspect.isfunction(function) and inspect.isfunction(above) and not name.startswith("__"):
            function.__signature__ = inspect.signature(above)  # type: ignore[attr-defined]
            function.__doc__ = function.__doc__ or above.__doc__
    own, theirs = inspect.signature(cls.__init__), inspect.signature(upstream.__init__).parameters
    *ours, last = own.parameters.values()
    rest = [p.replace(kind=p.KEYWORD_ONLY) for name, p in theirs.items() if name not in own.parameters]
    cls.__init__.__signature__ = own.replace(parameters=[*ours, *rest, last])
