"""Sidecars: files with the low-precision copies of a model that stays as it is, found by their names.

`model.low.gguf` belongs to `model.gguf` and to `model-00001-of-00003.gguf`. Whether it truly does is checked by the core
(csrc/io/fingerprint.h), whoever names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import List, Optional, Union

from ._split import base_name, is_part
from .errors import ModelFileError

__all__ = ["ARCHITECTURE", "FINGERPRINT_KEY", "LowModel", "find_sidecar", "low_path", "sidecar_path"]

ARCHITECTURE = "hobbit-sidecar"
"""general.architecture of a sidecar: no program takes it for a model."""
FINGERPRINT_KEY = "hobbit.sidecar.fingerprint"

# What says where the low copies are: a path, None: beside the model if there, False or "none": nowhere.
LowModel = Union[str, "os.PathLike[str]", bool, None]


def sidecar_path(model: Union[str, os.PathLike[str]]) -> Path:
    """The name that the sidecar of a model has."""
    path = Path(model)
    return path.with_name(f"{base_name(path)}.low.gguf")


def find_sidecar(model: Union[str, os.PathLike[str]]) -> Optional[Path]:
    """The sidecar beside a model, the first part of a split one; None when there is none."""
    path = sidecar_path(model)
    if path.exists():
        return path
    stem = base_name(path)
    first: List[Path] = []
    if path.parent.is_dir():
        prefix, parts = f"{stem}-00001-of-", sorted(os.listdir(path.parent))
        first = [path.with_name(name) for name in parts if name.startswith(prefix) and is_part(Path(name))]
    return first[0] if first else None


def low_path(model: str, low_model: LowModel) -> Optional[Path]:
    """The file that `low_model` means for a model.

    Raises:
        ModelFileError: There is no such file.
    """
    if low_model is None or low_model is True:
        return find_sidecar(model)
    if low_model is False or low_model == "none":
        return None
    path = Path(low_model)
    if not path.exists():
        raise ModelFileError(f"there is no file {path} (low_model)")
    return path
