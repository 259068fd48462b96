"""pytest plugin for llama-cpp-python's own tests: `llama_cpp.Llama` is ours, models are made here instead of downloaded.

HOBBIT_TEST_OFFLOAD: "" for offload=None, or the name of a mode, which then runs exact.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any, List, Optional

import numpy as np

import hobbit_cpp
from models import tiny, tiny_dual

OFFLOAD = os.environ["HOBBIT_TEST_OFFLOAD"] or None


_ITS_WEIGHTS = "asserts what the weights that it downloads say"
# Part of a test's id -> why it is left out.
LEFT_OUT = {
    "::test_real_model": _ITS_WEIGHTS + ", and is about llama_cpp._internals, not about Llama",
    "::test_real_llama": _ITS_WEIGHTS,
    "::test_real_llama_repeated_prompt_cache": _ITS_WEIGHTS,
    "recurrent_model": "downloads Mamba, and there is no such model here",
    "hybrid_model": "downloads Falcon-H1, and there is no such model here",
}


def _why_left_out(node: str) -> Optional[str]:
    for part, why in LEFT_OUT.items():
        if node.endswith(part) if part.startswith("::") else part in node:
            return why
    return None


def pytest_collection_modifyitems(config: Any, items: List[Any]) -> None:
    out = [item for item in items if _why_left_out(item.nodeid) is not None]
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=out)
    config.stash["left_out"] = out


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    for item in config.stash.get("left_out", []):
        terminalreporter.write_line(f"LEFT OUT {item.nodeid}: {_why_left_out(item.nodeid)}")


class Llama(hobbit_cpp.Llama):
    """As stock, with the offload under test wherever there are experts."""

    def __init__(self, model_path: Any, **kwargs: Any) -> None:
        if OFFLOAD is not None and not kwargs.get("vocab_only"):
            kwargs.update(offload=OFFLOAD, exact=True, expert_cache="25%")
        if kwargs.get("embedding"):
            kwargs.setdefault("pooling_type", 1)  # mean: the model that upstream downloads says so in its file
        # Results do not depend on it, and compute threads that spin make a busy machine slow.
        kwargs.update(n_threads=1, n_threads_batch=1)
        super().__init__(model_path, **kwargs)


def _model(repo_id: str, filename: str) -> str:
    if "stories15M" in filename or "bge" in filename:
        return str(tiny("mixtral", "Q8_0") if OFFLOAD is None else tiny_dual("mixtral"))
    raise LookupError(f"no stand-in for {repo_id}/{filename}")


def _log_softmax(x: Any) -> Any:
    x = np.asarray(x) - np.max(x)
    return x - np.log(np.exp(x).sum())


def _stand_in(name: str, **members: Any) -> None:
    """For what upstream's tests import beside llama_cpp."""
    module: Any = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


_stand_in("huggingface_hub", hf_hub_download=_model)
if importlib.util.find_spec("scipy") is None:
    _stand_in("scipy")
    _stand_in("scipy.special", log_softmax=_log_softmax)

import llama_cpp  # noqa: E402  after hobbit_cpp

llama_cpp.Llama = Llama  # type: ignore[misc]
