"""Routing of a model over a text, recorded: `Trace`, and `record` which makes one.

Example:
    >>> from hobbit_cpp.trace import Trace, record
    >>> trace = record("model.gguf", "some text")
    >>> trace.save("text.npz")
    >>> Trace.load("text.npz").ids.shape  # tokens, MoE layers, k
"""

from .format import Trace
from .record import record

__all__ = ["Trace", "record"]
