"""Fixtures that several files of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny_models
from gguf_files import make_model
from models import cache_dir

# Cold: what one test leaves must not be what another finds. Of subprocesses too.
os.environ["HOBBIT_HEAT"] = "0"


@pytest.fixture(scope="session")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MoE GGUF in F16."""
    return make_model(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="session")
def large_model() -> Path:
    """About 400 MB: more than the budgets of tests."""
    path = cache_dir() / "large-mixtral-512-f16.gguf"
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        tiny_models.write_tiny(partial, "mixtral", n_layer=8, n_expert=32, n_expert_used=4, n_embd=512, n_ff_exp=512)
        partial.rename(path)
    return path
