"""Fixtures that several files of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_files import make_model


@pytest.fixture(scope="session")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MoE GGUF in F16."""
    return make_model(tmp_path_factory.mktemp("model") / "model.gguf")
