"""Runs all contenders, alternating, each in a process of its own, and takes medians."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from . import conditions
from .contenders import Contender

__all__ = ["Setting", "abba", "budget_of", "median_row", "run_all", "run_once"]

Row = Dict[str, Any]

# What a cgroup counts beside the process's own pages: page tables, sockets, the pages of libraries that it was first to touch.
_KERNEL_SHARE, _KERNEL_LEAST = 0.02, 24 << 20


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common.

    Attributes:
        model: what the engine runs; stock_model: what stock llama.cpp runs.
        tokens: ids: the prompt's, then those that are decoded, and one more to be predicted.
        warm_up: tokens before the clock starts; with none, everything is cold.
        patience: seconds of decoding after which a run ends early.
        n_expert, n_expert_used: of the model, for `routing`.
        files: of both models, all parts.
    """

    model: Path
    stock_model: Path
    tokens: Sequence[int]
    n_prompt: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    threads: int
    patience: float
    warm_up: Sequence[int] = ()
    text: Optional[Path] = None
    routing: Optional[Path] = None
    n_expert: int = 0
    n_expert_used: int = 0
    files: Tuple[Path, ...] = ()


def abba(contenders: Sequence[Contender], rounds: int) -> Iterator[List[Contender]]:
    """The order of each round: A B, B A, A B, ..., so that what changes slowly (heat, other programs) hits all alike."""
    for i in range(rounds):
        yield list(contenders) if i % 2 == 0 else list(reversed(contenders))


def budget_of(memory: int) -> int:
    """What an engine with a budget of its own is told, within a cgroup of `memory` bytes."""
    return memory - max(int(memory * _KERNEL_SHARE), _KERNEL_LEAST)


def run_all(
    setting: Setting,
    contenders: Sequence[Contender],
    memories: Sequence[int],
    rounds: int,
    told: Callable[[str], None],
) -> Tuple[List[Row], int]:
    """All runs, in the order they were made; `told` hears of each. After Ctrl-C or SIGTERM those that were finished, if there are
    any, and the exit code that says so.
    """
    runs: List[Row] = []
    try:
        _run_all(setting, contenders, memories, rounds, told, runs)
    except (KeyboardInterrupt, SystemExit) as e:
        if not runs:
            raise
        told("interrupted: this is what was finished")
        return runs, 130 if isinstance(e, KeyboardInterrupt) else int(e.code or 0)
    return runs, 0


def _run_all(
    setting: Setting,
    contenders: Sequence[Contender],
    memories: Sequence[int],
    rounds: int,
    told: Callable[[str], None],
    runs: List[Row],
) -> None:
    total = len(memories) * len(contenders) * rounds
    for memory in memories:
        for number, order in enumerate(abba(contenders, rounds)):
            for contender in order:
                if any(r["contender"] == contender.name and r["memory"] == memory and "error" in r for r in runs):
                    total -= 1  # what failed once is not asked again
                    continue
                row = run_once(setting, contender, memory)
                row["round"] = number
                runs.append(row)
                what = row["error"] if "error" in row else f"{row['tok_s']:.2f} tokens/s"
                told(f"[{len(runs)}/{total}] {memory / (1 << 20):.0f} MiB, {contender.name}: {what}")


def run_once(setting: Setting, contender: Contender, memory: Optional[int]) -> Row:
    """One run in a process of its own. The row has `error` when it failed."""
    model = setting.stock_model if contender.kind == "stock" else setting.model
    row: Row = {"contender": contender.name, "kind": contender.kind, "memory": memory, "notes": []}
    cap = memory if contender.capped else None
    row["page_cache"] = conditions.drop_caches(setting.files or (setting.model, setting.stock_model))
    with conditions.read_ahead(model, contender.read_ahead) as why_not, conditions.memory_cgroup(cap) as cgroup:
        if why_not is not None:
            return {**row, "capped": False, "cap": "not run", "read_ahead": None, "error": why_not}
        row.update(read_ahead=conditions.get_read_ahead(model), capped=cgroup.folder is not None, cap=cgroup.how)
        try:
            if contender.kind == "command":
                row.update(_run_command(setting, contender, memory, cgroup))
            else:
                row.update(_run_worker(setting, contender, memory, cgroup, row["notes"]))
        except _RunError as e:
            row["error"] = str(e)
        row["peak_cgroup"] = cgroup.peak()
    if "error" not in row and contender.kind == "offload" and not contender.everything:
        row["within_budget"] = row["peak_rss"] <= row["memory_budget"]
    return row


class _RunError(Exception):
    """A run that gave no figures; the reason is for the row."""


def _run_worker(setting: Setting, contender: Contender, memory: Optional[int], cap: conditions.Cap, notes: List[str]) -> Row:
    budget = budget_of(memory) if memory is not None and contender.capped and contender.kind == "offload" else None
    job = {
        "kind": contender.kind,
        "model": str(setting.stock_model if contender.kind == "stock" else setting.model),
        "mode": contender.mode,
        "options": contender.options,
        "everything": contender.everything,
        "mmap": contender.mmap,
        "repack": True,
        "memory": budget,
        "tokens": list(setting.tokens),
        "n_prompt": setting.n_prompt,
        "n_ctx": setting.n_ctx,
        "n_batch": setting.n_batch,
        "n_ubatch": setting.n_ubatch,
        "threads": setting.threads,
        "n_expert": setting.n_expert,
        "n_expert_used": setting.n_expert_used,
        "warm_up": list(setting.warm_up),
        "patience": setting.patience,
        "routing": None if setting.routing is None or contender.kind == "stock" else str(setting.routing),
    }
    try:
        out = _work(job, cap)
    except _OutOfMemory as e:
        if contender.kind != "stock":
            raise
        # Stock llama.cpp copies weights of some types into memory of its own, repacked: more than it was given.
        job["repack"] = False
        try:
            out = _work(job, cap)
        except _OutOfMemory:
            raise e from None
        notes.append("no memory for repacked weights, so run with the weights as they are in the file")
    note = out.pop("note")
    if note:
        notes.append(note)
    if out["n_tokens"] < len(setting.tokens) - setting.n_prompt - 1:
        notes.append(f"ended after {out['n_tokens']} tokens: slower than --patience allows")
    return out


class _OutOfMemory(_RunError):
    """The kernel ended it, or llama.cpp was refused what it asked for."""


def _work(job: Dict[str, Any], cap: conditions.Cap) -> Row:
    with tempfile.TemporaryDirectory(prefix="hobbit-bench-") as folder:
        result, wanted = Path(folder) / "result.json", Path(folder) / "job.json"
        wanted.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
        command = [sys.executable, "-m", "hobbit_cpp.bench.worker", str(wanted)]
        code, output = _call(conditions.under_cgroup(command, cap), None)
        if code != 0:
            _fail(code, output, cap)
        out: Row = json.loads(result.read_text(encoding="utf-8"))
        return out


def _fail(code: int, output: str, cap: conditions.Cap) -> None:
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise _OutOfMemory("killed: it took more memory than the cap" if cap.kills() else "killed")
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if "insufficient memory" in last:  # llama.cpp's log
        raise _OutOfMemory(" ".join(last.split()))
    raise _RunError(" ".join(last.split()) or f"ended with code {code}")


def _run_command(setting: Setting, contender: Contender, memory: Optional[int], cap: conditions.Cap) -> Row:
    command = contender.command
    values = {
        "model": shlex.quote(str(setting.model)),
        "memory": str(memory or 0),
        "tokens": str(len(setting.tokens) - setting.n_prompt - 1),
        "prompt_tokens": str(setting.n_prompt),
        "threads": str(setting.threads),
        "text": shlex.quote(str(setting.text or "")),
    }
    for key, value in values.items():
        command = command.replace("{" + key + "}", value)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    # generous: what it does beside the tokens is unknown
    code, output = _call(conditions.under_cgroup(["/bin/sh", "-c", command], cap), 10 * setting.patience)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        _fail(code, output, cap)
    found = re.findall(contender.regex, output)
    if not found:
        raise _RunError("its output has no match of --command-regex")
    figure = found[-1] if isinstance(found[-1], str) else found[-1][0]
    try:
        rate = float(figure)
    except ValueError:
        raise _RunError(f"--command-regex found {figure!r}, which is no number") from None
    return {"tok_s": rate, "wall_s": seconds, "disk_mb": (after.ru_inblock - before.ru_inblock) * 512 / 1e6}


def _call(command: List[str], timeout: Optional[float]) -> tuple[int, str]:
    """Runs to the end. Returns the exit code and all output; when we are interrupted, the whole process group ends."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        raise _RunError(f"was ended after {timeout:.0f} s") from None
    finally:
        # also what the shell left behind
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- medians ----


def median_row(runs: Sequence[Row]) -> Row:
    """The runs of one contender at one memory as one row: medians of the numbers, the worst of the peaks."""
    good = [run for run in runs if "error" not in run]
    row: Row = {key: runs[0].get(key) for key in ("contender", "kind", "memory", "cap", "capped", "read_ahead", "page_cache")}
    row["runs"], row["failed"] = len(good), len(runs) - len(good)
    row["notes"] = list(dict.fromkeys(note for run in runs for note in run.get("notes", [])))
    if not good:
        row["error"] = next(run["error"] for run in runs)
        return row
    if row["failed"]:
        row["notes"].append(f"{row['failed']} of {len(runs)} runs failed: {next(r['error'] for r in runs if 'error' in r)}")
    row.update({key: good[0][key] for key in ("cap", "capped", "read_ahead", "page_cache")})
    for key in good[0]:
        values = [run.get(key) for run in good]
        if key in row or key == "round" or not all(isinstance(v, (int, float)) for v in values):
            continue
        numbers = [float(v) for v in values if isinstance(v, (int, float))]
        if isinstance(values[0], bool):
            row[key] = all(values)
        elif key.startswith("peak_"):
            row[key] = int(max(numbers))
        else:
            middle = statistics.median(numbers)
            row[key] = int(middle) if isinstance(values[0], int) and middle.is_integer() else middle
    speeds = [run["tok_s"] for run in good]
    row["tok_s_min"], row["tok_s_max"] = min(speeds), max(speeds)
    return row
