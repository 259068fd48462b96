"""Run a model over a text and keep the logits: in this process, or as a program in another one.

python decode.py MODEL TOKENS.npy OUT.npy CHUNK THREADS     with whatever llama_cpp the environment gives
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import numpy.typing as npt

from unpatched import unpatched_env

TEXT = b"The quick brown fox jumps over the lazy dog, and runs away from all the hunters in the wood; then it sleeps. "


def load(cls: Any, path: str, threads: int, **kwargs: Any) -> Any:
    return cls(
        path, n_ctx=256, n_batch=64, n_ubatch=64, logits_all=True, verbose=False, n_threads=threads,
        n_threads_batch=threads, **kwargs,
    )  # fmt: skip


def logits(llm: Any, tokens: Sequence[int], chunk: int) -> npt.NDArray[np.float32]:
    """[tokens, vocabulary]; `chunk` tokens a llama_decode."""
    llm.reset()
    for i in range(0, len(tokens), chunk):
        llm.eval(list(tokens[i : i + chunk]))
    out: npt.NDArray[np.float32] = llm.scores[: len(tokens)].copy()
    return out


def words(llm: Any, n: int) -> list[int]:
    tokens = llm.tokenize(TEXT)
    return list((tokens * (n // len(tokens) + 1))[:n])


def stock_logits(path: Path, tokens: Sequence[int], chunk: int, folder: Path, threads: int = 2) -> npt.NDArray[np.float32]:
    """The same of llama.cpp without our patches, in a process of its own; `folder` is for its files."""
    np.save(folder / "tokens.npy", np.array(tokens))
    command = [sys.executable, __file__, str(path), str(folder / "tokens.npy"), str(folder / "logits.npy")]
    subprocess.run([*command, str(chunk), str(threads)], env=unpatched_env(), check=True)
    out: npt.NDArray[np.float32] = np.load(folder / "logits.npy")
    return out


if __name__ == "__main__":
    import llama_cpp

    model = load(llama_cpp.Llama, sys.argv[1], int(sys.argv[5]))
    np.save(sys.argv[3], logits(model, np.load(sys.argv[2]).tolist(), int(sys.argv[4])))
