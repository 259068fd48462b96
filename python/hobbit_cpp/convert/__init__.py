"""Makes GGUF files with high- and low-precision experts: see `convert`."""

from __future__ import annotations

from .errors import ConvertError
from .job import ConvertReport, convert

__all__ = ["ConvertError", "ConvertReport", "convert"]
