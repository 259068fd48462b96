"""Tiny random expert models for tests: ``python -m tiny_models OUTDIR`` (in tests/python).

``SHAPES``: three routings at any size. ``ARCHITECTURES``: a model for each architecture of the pinned llama.cpp that has
routed experts, at one size. Vocabulary, weights and writing are shared.
"""

from __future__ import annotations

from .architectures import ARCHITECTURES
from .shapes import SHAPES
from .write import write_architecture, write_tiny

__all__ = ["ARCHITECTURES", "SHAPES", "write_architecture", "write_tiny"]
