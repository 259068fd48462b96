"""Run a model over a text and keep the logits: in this process, or as a program in another one.

python decode.py MODEL[,MODEL...] TOKENS.npy OUT.npz CHUNK THREADS     with whatever llama_cpp the environment gives
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


def embeddings(llm: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """[tokens, n_embd], of a model loaded with `embedding=True`."""
    return np.array(llm.embed(llm.detokenize(list(tokens)[1:]).decode()), np.float32)


def words(llm: Any, n: int) -> list[int]:
    tokens = llm.tokenize(TEXT)
    return list((tokens * (n // len(tokens) + 1))[:n])


def stock_logits(path: Path, tokens: Sequence[int], chunk: int, folder: Path, threads: int = 2) -> npt.NDArray[np.float32]:
    """The same of llama.cpp without our patches, in a process of its own; `folder` is for its files."""
    return stock_logits_of([path], tokens, chunk, folder, threads)[0]


def stock_logits_of(
    paths: Sequence[Path], tokens: Sequence[int], chunk: int, folder: Path, threads: int
) -> list[npt.NDArray[np.float32]]:
    """For several models."""
    np.save(folder / "tokens.npy", np.array(tokens))
    names = [__file__, ",".join(map(str, paths)), str(folder / "tokens.npy"), str(folder / "logits.npz")]
    subprocess.run([sys.executable, *names, str(chunk), str(threads)], env=unpatched_env(), check=True)
    out = np.load(folder / "logits.npz")
    return [out[f"arr_{i}"] for i in range(len(paths))]


if __name__ == "__main__":
    import llama_cpp

    outs = []
    for path in sys.argv[1].split(","):
        model = load(llama_cpp.Llama, path, int(sys.argv[5]))
        outs.append(logits(model, np.load(sys.argv[2]).tolist(), int(sys.argv[4])))
        model.close()
    np.savez(sys.argv[3], *outs)
