#!/usr/bin/env python3
"""Every expert in memory: what the offload costs where it has nothing to do, against stock llama.cpp with all its repacking.

    tests/bench/resident.py [--types Q8_0 Q4_K ...] [--like qwen3-30b-a3b] [--layers 6] [--model FILE]

Both are loaded into this process, and take turns in short blocks, so that what else the machine does hits both: the figure is the
median of the ratios of neighbouring blocks. Models have random weights (scripts/make_shape_model.py), or are given by --model.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

from hobbit_cpp import Llama, OffloadParams

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TYPES = ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "Q2_K", "MXFP4"]


def timed(llm: Any, tokens: List[int], one_by_one: bool) -> float:
    """Tokens a second, from a context of 64 tokens."""
    llm.reset()
    llm.eval(tokens[:64])
    begin = time.perf_counter()
    for step in [[t] for t in tokens[64:]] if one_by_one else [tokens[64:]]:
        llm.eval(step)
    return (len(tokens) - 64) / (time.perf_counter() - begin)


def compare(path: Path, blocks: int, threads: int) -> Dict[str, Dict[str, List[float]]]:
    """Tokens a second by phase and contender, one figure a block."""
    common: Dict[str, Any] = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    params = OffloadParams(exact=True, heat=False, yield_memory=False)
    ours = Llama(str(path), offload=params, expert_cache="100%", **common)
    stock = Llama(str(path), offload=None, use_mmap=False, **common)
    tokens = [(i * 7919) % (stock.n_vocab() - 1) for i in range(64 + 512)]
    for _ in range(2):  # all experts come in
        ours.eval(tokens)
        ours.reset()
    result: Dict[str, Dict[str, List[float]]] = {}
    for phase, n, rounds in (("decode", 64 + 24, blocks), ("prefill", 64 + 512, max(3, blocks // 3))):
        rows: Dict[str, List[float]] = {"ours": [], "stock": []}
        for i in range(rounds + 1):  # the first is for warming up
            for name, llm in (("ours", ours), ("stock", stock)) if i % 2 else (("stock", stock), ("ours", ours)):
                speed = timed(llm, tokens[:n], phase == "decode")
                if i > 0:
                    rows[name].append(speed)
        result[phase] = rows
    ours.close()
    stock.close()
    return result


def show(name: str, result: Dict[str, Dict[str, List[float]]]) -> None:
    """A line."""
    cells = []
    for phase, rows in result.items():
        ratios = sorted(a / b for a, b in zip(rows["ours"], rows["stock"]))
        ours, stock = (statistics.median(rows[k]) for k in ("ours", "stock"))
        cells.append(
            f"{phase} {ours:7.2f} of {stock:7.2f} tok/s: {statistics.median(ratios):.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )
    print(f"{name:8} {'   '.join(cells)}", flush=True)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--like", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--model", type=Path, help="measure this file instead")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.model is not None:
        show(args.model.name, compare(args.model, args.blocks, args.threads))
        return 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for name in args.types:
            path = Path(folder) / f"{name}.gguf"
            make = [sys.executable, str(SCRIPTS / "make_shape_model.py"), "--like", args.like, "--layers", str(args.layers)]
            subprocess.run([*make, "--out", str(path), "--high", name], check=True, stderr=subprocess.DEVNULL)
            show(name, compare(path, args.blocks, args.threads))
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
