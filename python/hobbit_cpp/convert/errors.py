"""What can go wrong in a conversion."""

from __future__ import annotations

from hobbit_cpp.errors import HobbitError


class ConvertError(HobbitError, RuntimeError):
    """A conversion was refused or failed; the message is one line that says what to do."""
