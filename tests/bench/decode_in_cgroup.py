"""Decode speed of the modes and of stock llama.cpp with mmap, side by side, each in a memory cgroup of the same size.

    python tests/bench/decode_in_cgroup.py --model DUAL.gguf --stock-model PLAIN.gguf --text FILE
        [--limit 1000MiB] [--memory 900MiB] [--tokens 128] [--rounds 3] [--warm] [--contenders hobbit,exact,lru,mmap,mmap-128]
        [--json FILE]

Each contender runs in a process of its own, page cache dropped before it, the same real text fed one token per llama_decode, so
that all compute the same tokens. Rounds alternate (A B C, C B A, ...); medians are printed. `mmap` uses the block device's
read-ahead as it is, `mmap-128` sets it to 128 KiB for the run. Needs root, cgroup v1 or v2, and /proc/sys/vm/drop_caches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from hobbit_cpp._memory import human, parse_size

SKIP = 512  # characters of the text that are left out: titles


# ---- the worker: one contender ---------------------------------------------------------------------------------------


def worker(job: Dict[str, Any]) -> Dict[str, Any]:
    import numpy as np

    from hobbit_cpp import Llama, OffloadParams

    name = job["contender"]
    kwargs: Dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "verbose": False, "seed": 1}
    kwargs.update(n_threads=job["threads"], n_threads_batch=job["threads"])
    begin = time.perf_counter()
    llm: Any
    if name.startswith("mmap") or name == "memory":
        if name == "memory":
            kwargs["use_mmap"] = False
        llm = Llama(job["stock_model"], **kwargs)
    else:
        mode, exact = ("hobbit", True) if name == "exact" else (name, None)
        params = OffloadParams(mode=mode, **job.get("params", {}).get(name, {}))
        cache = "100%" if job["memory"] is None else None
        llm = Llama(job["model"], offload=params, exact=exact, memory=job["memory"], expert_cache=cache, **kwargs)
    loaded = time.perf_counter() - begin

    tokens = llm.tokenize(Path(job["text"]).read_bytes()[SKIP : SKIP + 40 * (job["tokens"] + 1)])[: job["tokens"] + 1]
    if job["warm"]:
        for token in tokens:
            llm.eval([token])
        llm.reset()
        if llm._session is not None:
            llm.reset_offload_stats()
    nll, seconds, lap = 0.0, 0.0, []
    user, system = os.times()[:2]
    for now, then in zip(tokens, tokens[1:]):
        begin = time.perf_counter()
        llm.eval([now])
        lap.append(time.perf_counter() - begin)
        row = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).astype(np.float64)
        nll += float(np.logaddexp.reduce(row) - row[then])
        seconds += lap[-1]
        if seconds > job["patience"]:
            break
    n = len(lap)
    out: Dict[str, Any] = {
        "contender": name,
        "tokens": n,
        "tok_s": n / seconds,
        "tok_s_last_half": len(lap[n // 2 :]) / sum(lap[n // 2 :]),
        "load_s": loaded,
        "user_ms_token": (os.times().user - user) / n * 1e3,
        "system_ms_token": (os.times().system - system) / n * 1e3,
        "ppl": math.exp(nll / n),
    }
    if llm._session is not None:
        s = llm.offload_stats()
        out.update(
            mb_token=s.bytes_per_token / 1e6,
            hit_rate=s.hit_rate,
            high=(s.hits_high + s.loads_high) / s.selections,
            low=(s.hits_low + s.loads_low) / s.selections,
            skip=s.skips / s.selections,
            loads_high=s.loads_high,
            loads_low=s.loads_low,
            mass_low=s.mass_low / s.mass_total,
            mass_skipped=s.mass_skipped / s.mass_total,
            stall=s.stall_seconds / s.eval_seconds,
            prefetch=[s.prefetches, s.prefetches_useful, s.prefetches_late, s.prefetches_wasted],
            prefetch_mb=s.bytes_prefetch / 1e6,
            wasted_mb=s.bytes_wasted / 1e6,
            recall=s.recall,
            slots=[s.slots_high, s.slots_low],
            pool_mb=s.pool_bytes / 1e6,
            gb_s=s.bytes_read / max(seconds, 1e-9) / 1e9,
            budget_mb=s.memory_budget / 1e6,
            rss_mb=s.peak_memory / 1e6,
        )
    llm.close()
    return out


# ---- the conditions --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_cgroup(limit: Optional[int]) -> Iterator[Optional[Path]]:
    """A memory cgroup for child processes; None where there is no limit to set."""
    if limit is None:
        yield None
        return
    v1 = Path("/sys/fs/cgroup/memory")
    root = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    folder = root / f"hobbit-bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if root == v1 else "memory.max")).write_text(str(limit))
        yield folder
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def peak(folder: Optional[Path]) -> int:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if folder is not None and (folder / name).is_file():
            return int((folder / name).read_text())
    return 0


@contextlib.contextmanager
def read_ahead(path: str, kib: Optional[int]) -> Iterator[None]:
    """Read-ahead of the block device under `path`; None leaves it."""
    dev = os.stat(path).st_dev
    setting = Path(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}/bdi/read_ahead_kb")
    before = setting.read_text()
    if kib is not None:
        setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def run(job: Dict[str, Any], limit: Optional[int]) -> Dict[str, Any]:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    kib = 128 if job["contender"] == "mmap-128" else None
    with memory_cgroup(limit) as folder, read_ahead(job["stock_model"], kib):

        def enter() -> None:
            if folder is not None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True)
        if done.returncode != 0:
            return {"contender": job["contender"], "error": done.stderr.strip().splitlines()[-1:] or done.returncode}
        out: Dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        out["peak_mb"] = peak(folder) / 1e6
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="the file that hobbit, exact and lru run")
    parser.add_argument("--stock-model", help="the file that stock llama.cpp runs (default: the same)")
    parser.add_argument("--text")
    parser.add_argument("--limit", default="1000MiB", help="of the cgroup; 'none' for no cgroup")
    parser.add_argument(
        "--memory",
        default="95%",
        help="memory= of the offloaded: bytes, or a share of the limit; 'all' caches everything",
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="the text once before the clock starts")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds after which a run ends early")
    parser.add_argument("--contenders", default="hobbit,exact,lru,mmap-128,mmap")
    parser.add_argument("--params", default="{}", help='JSON: {"hobbit": {"prefetch_depth": 0}, ...}')
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return

    limit = None if args.limit == "none" else parse_size(args.limit)
    memory = None if args.memory == "all" else parse_size(args.memory, of=limit)
    names = args.contenders.split(",")
    rows: Dict[str, List[Dict[str, Any]]] = {name: [] for name in names}
    for i in range(args.rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            job = {
                "contender": name, "model": args.model, "stock_model": args.stock_model or args.model, "text": args.text,
                "memory": memory, "tokens": args.tokens, "threads": args.threads, "patience": args.patience, "warm": args.warm,
                "params": json.loads(args.params),
            }  # fmt: skip
            row = run(job, limit)
            rows[name].append(row)
            print(json.dumps(row), flush=True)
    print(f"\ncgroup {human(limit) if limit else 'none'}, memory= {human(memory) if memory else 'all'}, "
          f"{args.threads} threads, {args.tokens} tokens, {args.rounds} rounds, medians; "
          + ("the same text once before" if args.warm else "page cache dropped"))  # fmt: skip
    heads = ("tok/s", 7), ("last half", 9), ("MB/token", 9), ("hits", 6), ("high/low/skip", 16), ("stall", 6), ("ppl", 7)
    print(" " * 10, *(f"{head:>{width}}" for head, width in heads), f"{'peak MB':>8}")
    for name, all_rows in rows.items():
        good = [r for r in all_rows if "error" not in r]
        if not good:
            print(f"{name:>10} failed: {all_rows[0]['error']}")
            continue

        def median(key: str, good: List[Dict[str, Any]] = good) -> float:
            return statistics.median(float(r.get(key, float("nan"))) for r in good)

        mix = "/".join(f"{median(k):.3f}" for k in ("high", "low", "skip"))
        print(
            f"{name:>10} {median('tok_s'):7.2f} {median('tok_s_last_half'):9.2f} {median('mb_token'):9.1f} "
            f"{median('hit_rate'):6.3f} {mix:>16} {median('stall'):6.2f} {median('ppl'):7.2f} "
            f"{max(r['peak_mb'] for r in good):8.0f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
