"""How well the routers of the next layers are predicted, with and without corrections, on real text one token per decode.

    python tests/bench/recall.py --model MODEL --text FILE [--tokens 256] [--depth 3]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, List

from hobbit_cpp import Llama, OffloadParams


def run(model: str, tokens: List[int], depth: int, norm_correction: bool, gate_correction: bool) -> Any:
    params = OffloadParams(
        exact=True,
        prefetch_depth=depth,
        prefetch_always=True,
        norm_correction=norm_correction,
        gate_correction=gate_correction,
    )
    llm = Llama(model, offload=params, expert_cache="25%", n_ctx=len(tokens), n_threads=os.cpu_count(), verbose=False)
    for token in tokens:
        llm.eval([token])
    stats = llm.offload_stats()
    llm.close()
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    args = parser.parse_args()
    vocabulary = Llama(args.model, vocab_only=True, verbose=False)
    tokens = vocabulary.tokenize(args.text.read_bytes()[512 : 512 + 16 * args.tokens])[: args.tokens]
    vocabulary.close()
    for norm_correction, gate_correction in ((False, False), (True, False), (True, True)):
        recall = run(args.model, tokens, args.depth, norm_correction, gate_correction).recall
        line = ", ".join(f"{d} ahead {value:.3f}" for d, value in sorted(recall.items()))
        state = f"norm correction {'on ' if norm_correction else 'off'}, gate correction {'on ' if gate_correction else 'off'}"
        print(f"{state}: recall {line} ({len(tokens)} tokens)")


if __name__ == "__main__":
    main()
