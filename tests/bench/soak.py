#!/usr/bin/env python3
"""Use a model for many minutes as users do, and see that memory stays flat: soak.py MODEL [--minutes 20] [--out PREFIX]

Random prompts, streams that are dropped, cancels from another thread, resets, rewinds, saved states, other budgets (the model is
loaded again with another memory=). After each, memory, threads and file descriptors are sampled. What the process holds between
two models must not grow over the second half (a line is fitted), no sample may be over the budget, threads and descriptors must
always be the same.

Writes PREFIX.csv, and PREFIX.png where matplotlib is installed. Exit status 1 when something grew.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import random
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from hobbit_cpp import EvaluationCancelled, HobbitWarning, Llama
from hobbit_cpp._memory import give_back, human, resident

TEXT = (
    "the a model of experts reads what it needs from disk and keeps what was used while rivers run to sea under old bridges "
    "where nobody asked why seven clocks were late on a winter morning in the north"
)
Row = Dict[str, Any]


class Soak:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = random.Random(args.seed)
        self.rows: List[Row] = []
        self.counts: Dict[str, int] = {}
        self.tokens = 0
        self.budgets: List[int] = []
        self.closed: List[Tuple[float, int]] = []  # when, and what the process held without a model
        self.llm: Any = self._load(expert_cache="10%")
        first = self.llm.offload_stats()
        span = self.llm.offload_info.pool_max
        # what Python and its modules come to hold after the first model, and the share that a budget keeps back
        least = int(first.memory_budget * 1.02) + (16 << 20)
        self.budgets = [least + int(span * share) for share in (0.0, 0.1, 0.25, 0.5)]

    def _load(self, **size: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HobbitWarning)
            return Llama(
                str(self.args.model), offload="hobbit", n_ctx=512, n_batch=128, n_ubatch=128, verbose=False,
                n_threads=self.args.threads, n_threads_batch=self.args.threads, seed=self.args.seed, **size,
            )  # fmt: skip

    def _prompt(self) -> str:
        return " ".join(self.rng.choices(TEXT.split(), k=self.rng.choice((1, 8, 40, 150))))

    def _ask(self, stream: bool) -> Any:
        n = self.rng.randrange(1, 40)
        return self.llm.create_completion(self._prompt(), max_tokens=n, temperature=0.8, stream=stream)

    # ---- what users do ----

    def complete(self) -> None:
        self.tokens += self._ask(stream=False)["usage"]["total_tokens"]

    def stream(self) -> None:
        self.tokens += sum(1 for _ in self._ask(stream=True))

    def drop_a_stream(self) -> None:
        chunks = self._ask(stream=True)
        for _ in range(self.rng.randrange(1, 5)):
            self.tokens += next(chunks, None) is not None

    def cancel(self) -> None:
        timer = threading.Timer(self.rng.expovariate(1.0), self.llm.cancel)
        timer.start()
        try:
            self._ask(stream=False)
        except EvaluationCancelled:
            self.counts["cancelled"] = self.counts.get("cancelled", 0) + 1
        finally:
            timer.cancel()
            timer.join()

    def reset(self) -> None:
        self.llm.reset()
        self.llm.reset_offload_stats()

    def rewind(self) -> None:
        """Another end to the same text."""
        tokens = self.llm.tokenize(self._prompt().encode())[:300]
        self.llm.reset()
        self.llm.eval(tokens)
        self.llm.n_tokens = len(tokens) // 2
        self.llm.eval(tokens[-10:])
        self.tokens += len(tokens)

    def state(self) -> None:
        """Away and back."""
        saved = self.llm.save_state()
        self.complete()
        self.llm.load_state(saved)

    def other_budget(self) -> None:
        self.llm.close()
        self.llm = None
        gc.collect()
        give_back()
        self.closed.append((time.monotonic(), resident()))
        self.llm = self._load(memory=self.rng.choice(self.budgets))

    def run(self) -> None:
        actions = [self.complete, self.stream, self.drop_a_stream, self.cancel, self.reset, self.rewind, self.state]
        begin = time.monotonic()
        last_load = begin
        while time.monotonic() < begin + 60 * self.args.minutes:
            action = self.rng.choice(actions)
            if time.monotonic() > last_load + self.args.reload:
                action, last_load = self.other_budget, time.monotonic()
            action()
            self.counts[action.__name__] = self.counts.get(action.__name__, 0) + 1
            stats = self.llm.offload_stats()
            held = resident()
            self.rows.append(
                {
                    "seconds": round(time.monotonic() - begin, 2),
                    "action": action.__name__,
                    "resident": held,
                    "pool": stats.pool_bytes,
                    "beside_pool": held - stats.pool_bytes,
                    "budget": stats.memory_budget,
                    "threads": len(os.listdir("/proc/self/task")),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "objects": len(gc.get_objects()),
                    "tokens": self.tokens,
                }
            )
        self.llm.close()


def growth_of(name: str, x: List[float], y: List[int]) -> float:
    """Bytes by which a line through the second half grows."""
    first = next(i for i, at in enumerate(x) if at > (x[0] + x[-1]) / 2)
    x, y = x[first:], y[first:]
    slope = float(np.polyfit(x, y, 1)[0])
    growth = slope * (x[-1] - x[0])
    print(
        f"{name}: {human(min(y))} to {human(max(y))} in the second half ({len(y)} samples), fitted growth "
        f"{growth / (1 << 20):+.2f} MiB ({slope * 3600 / (1 << 20):+.1f} MiB/h)"
    )
    return growth


def report(rows: List[Row], closed: List[Tuple[float, int]], counts: Dict[str, int]) -> List[str]:
    """Prints the figures; what is wrong."""
    print(f"{len(rows)} actions in {rows[-1]['seconds'] / 60:.1f} minutes, {rows[-1]['tokens']} tokens: {counts}")
    growth_of("beside the pool", [r["seconds"] for r in rows], [r["beside_pool"] for r in rows])
    growth = growth_of("without a model", [at for at, _ in closed], [held for _, held in closed])
    over = [r for r in rows if r["budget"] and r["resident"] > r["budget"]]
    print(f"peak {human(max(r['resident'] for r in rows))}, over the budget in {len(over)} of {len(rows)} samples")
    wrong = [f"the process without a model grew by {human(growth)} in the second half"] if growth > 4 << 20 else []
    wrong += [f"{len(over)} samples over the budget"] if over else []
    for name in ("threads", "descriptors"):
        seen = sorted({r[name] for r in rows})
        print(f"{name}: {seen}")
        wrong += [f"{name} vary: {seen}"] if len(seen) > 1 else []
    return wrong


def plot(rows: List[Row], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    minutes = [r["seconds"] / 60 for r in rows]
    figure, axes = plt.subplots(figsize=(9, 4))
    for name in ("budget", "resident", "pool", "beside_pool"):
        axes.plot(minutes, [r[name] / (1 << 20) for r in rows], label=name.replace("_", " the "), linewidth=1)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--reload", type=float, default=30, metavar="SECONDS", help="between two budgets; default: 30")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak"), metavar="PREFIX")
    args = parser.parse_args()
    soak = Soak(args)
    soak.run()
    with args.out.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(soak.rows[0]))
        writer.writeheader()
        writer.writerows(soak.rows)
    plot(soak.rows, args.out.with_suffix(".png"))
    wrong = report(soak.rows, soak.closed, soak.counts)
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
