#!/usr/bin/env python3
"""Use a model for many minutes as users do, and see that memory stays flat: soak.py MODEL [--minutes 20] [--out PREFIX]

Random prompts, streams that are dropped, cancels from another thread, resets, rewinds, saved states. After each, memory, threads
and file descriptors are sampled. In the first half the model is loaded again every 30 seconds with another memory=: what the
process holds between two models must not grow. The second half is the life of one model: what is held beside its pool must not
grow either. Growth is what goes on: what comes to rest is said to be a plateau. No sample may be over the budget, threads and
descriptors must always be the same.

Prints a verdict and writes PREFIX.csv, and PREFIX.png where matplotlib is installed; also when it is ended early, by Ctrl-C or
SIGTERM. Exit status 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Tuple

from hobbit_cpp import EvaluationCancelled, HobbitWarning, Llama
from hobbit_cpp._memory import give_back, human, resident

TEXT = (
    "the a model of experts reads what it needs from disk and keeps what was used while rivers run to sea under old bridges "
    "where nobody asked why seven clocks were late on a winter morning in the north"
)
Row = Dict[str, Any]
TOLERANCE = 2 << 20  # bytes by which medians of the same state differ


class _Mallinfo2(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def allocated() -> int:
    """Bytes that malloc has given out and not got back, of all threads; 0 where glibc does not say (before 2.33)."""
    info = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if info is None:
        return 0
    info.restype = _Mallinfo2
    held = info()
    return int(held.uordblks + held.hblkhd)


def descriptors() -> int:
    """Open files, but for those of /proc and /sys: a thread of the library looks at the pressure on memory once a second."""
    n = 0
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since
            n += not os.readlink(entry.path).startswith(("/proc/", "/sys/"))
    return n


class Soak:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = random.Random(args.seed)
        self.rows: List[Row] = []
        self.counts: Dict[str, int] = {}
        self.tokens = 0
        self.budgets: List[int] = []
        self.closed: List[Tuple[float, int]] = []  # when, and what the process held without a model
        self.stopped = False
        # One thread for all cancels, there before anything is counted: one that ended is seen in /proc for a moment longer.
        self.canceller = ThreadPoolExecutor(1)
        self.canceller.submit(int).result()
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
        over = threading.Event()
        later = self.canceller.submit(self._cancel_after, self.rng.expovariate(1.0), over)
        try:
            self._ask(stream=False)
        except EvaluationCancelled:
            self.counts["cancelled"] = self.counts.get("cancelled", 0) + 1
        finally:
            over.set()
            later.result()

    def _cancel_after(self, seconds: float, over: threading.Event) -> None:
        if not over.wait(seconds):
            self.llm.cancel()

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

    def stop(self, *_: Any) -> None:
        """Ends `run` after the action at hand, which is cut short. A signal handler."""
        self.stopped = True
        if self.llm is not None:
            self.llm.cancel()

    def run(self) -> None:
        actions = [self.complete, self.stream, self.drop_a_stream, self.cancel, self.reset, self.rewind, self.state]
        self.complete()  # the compute threads are made by the first batch
        begin = time.monotonic()
        half, end = begin + 30 * self.args.minutes, begin + 60 * self.args.minutes
        last_load = begin
        while time.monotonic() < end and not self.stopped:
            action = self.rng.choice(actions)
            if time.monotonic() < half and time.monotonic() > last_load + self.args.reload:
                action, last_load = self.other_budget, time.monotonic()
            try:
                action()
            except EvaluationCancelled:
                if not self.stopped:
                    raise
                break
            self.counts[action.__name__] = self.counts.get(action.__name__, 0) + 1
            stats = self.llm.offload_stats()
            held = resident()
            self.rows.append(
                {
                    "seconds": round(time.monotonic() - begin, 2),
                    "action": action.__name__,
                    "model": len(self.closed),
                    "resident": held,
                    "pool": stats.pool_bytes,
                    "beside_pool": held - stats.pool_bytes,
                    "allocated": allocated(),
                    "budget": stats.memory_budget,
                    "threads": len(os.listdir("/proc/self/task")),
                    "descriptors": descriptors(),
                    "objects": len(gc.get_objects()),
                    "tokens": self.tokens,
                }
            )
        self.llm.close()


def growth_of(name: str, samples: List[int]) -> List[str]:
    """Prints how the medians of four quarters follow each other; what is wrong.

    What leaks, leaks as much in the last quarter as in the one before. What is filled once (buffers that take the size of the
    longest text, the ring of past tokens, pieces between blocks) does so at the beginning, and ever less afterwards.
    """
    if len(samples) < 16:
        print(f"{name}: {len(samples)} samples, too few to tell")
        return []
    quarters = [median(samples[len(samples) * i // 4 : len(samples) * (i + 1) // 4]) for i in range(4)]
    before, last = quarters[2] - quarters[1], quarters[3] - quarters[2]
    grows = last > TOLERANCE and last > before / 2
    kind = "grows" if grows else "reaches a plateau" if quarters[3] - quarters[0] > TOLERANCE else "flat"
    print(f"{name}: {kind}; medians of the quarters of {len(samples)} samples: " + ", ".join(map(human, quarters)))
    wrong = f"{name}: {last / 1024:+.0f} KiB in the last quarter, {before / 1024:+.0f} KiB in the one before"
    return [wrong] if grows else []


def report(rows: List[Row], closed: List[Tuple[float, int]], counts: Dict[str, int]) -> List[str]:
    """Prints the figures; what is wrong."""
    if not rows:
        return ["it was ended before anything was measured"]
    print(f"{len(rows)} actions in {rows[-1]['seconds'] / 60:.1f} minutes, {rows[-1]['tokens']} tokens: {counts}")
    longest = [r for r in rows if r["model"] == rows[-1]["model"]]
    wrong = growth_of("process without a model", [held for _, held in closed])
    wrong += growth_of("last model, resident beside the pool", [r["beside_pool"] for r in longest])
    wrong += growth_of("last model, in use by malloc", [r["allocated"] for r in longest])
    over = [r for r in rows if r["budget"] and r["resident"] > r["budget"]]
    print(f"peak {human(max(r['resident'] for r in rows))}, over the budget in {len(over)} of {len(rows)} samples")
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
    for name in ("budget", "resident", "pool", "beside_pool", "allocated"):
        axes.plot(minutes, [r[name] / (1 << 20) for r in rows], label=name.replace("_", " the "), linewidth=1)
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--reload", type=float, default=30, metavar="SECONDS", help="of a budget, in the first half; default: 30")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak"), metavar="PREFIX")
    args = parser.parse_args()
    soak = Soak(args)
    signal.signal(signal.SIGTERM, soak.stop)
    signal.signal(signal.SIGINT, soak.stop)
    wrong: List[str] = []
    try:
        soak.run()
    except Exception as e:
        wrong = [f"{type(e).__name__}: {e}"]
        raise
    finally:
        wrong += report(soak.rows, soak.closed, soak.counts)
        for text in wrong:
            print(f"WRONG: {text}")
        print("VERDICT:", "wrong" if wrong else "nothing grows", flush=True)
        if soak.rows:
            with args.out.with_suffix(".csv").open("w", newline="") as f:
                writer = csv.DictWriter(f, list(soak.rows[0]))
                writer.writeheader()
                writer.writerows(soak.rows)
            plot(soak.rows, args.out.with_suffix(".png"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
