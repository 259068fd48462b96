"""Files with the shapes of well-known models and random weights: see make_shape_model.py."""

from __future__ import annotations

from .shapes import SHAPES
from .write import ShapeReport, make

__all__ = ["SHAPES", "ShapeReport", "make"]
