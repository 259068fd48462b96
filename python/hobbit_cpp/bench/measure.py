"""`hobbit bench`: from what was asked to the document and the tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import hobbit_cpp
from hobbit_cpp import _lib, _memory, probe
from hobbit_cpp._sidecar import low_path
from hobbit_cpp.convert.ggtypes import load_types
from hobbit_cpp.convert.source import Source
from hobbit_cpp.errors import HobbitError, ParameterError
from hobbit_cpp.trace import Trace

from . import conditions
from .contenders import RESIDENT, USUAL_READ_AHEAD, Contender
from .forecast import Machine, forecast, measure_machine
from .replayed import fit_trace
from .report import FORMAT, build_rows
from .roof import add_roof
from .runner import Row, Setting, abba, median_row, run_all, run_once
from .sizes import Sizes, Weights, measure_sizes, read_weights
from .text import Tokens, tokens_of

__all__ = ["Request", "measure"]

FLOOR_TOKENS = 64
"""Decoded for the compute floor: enough for a mean, and a large model takes long."""


@dataclass(frozen=True)
class Request:
    """What was asked. `memories`: bytes."""

    model: Path
    stock_model: Path
    contenders: List[Contender]
    memories: List[int]
    tokens: int
    n_prompt: int
    rounds: int
    warm: bool
    threads: int
    text: Optional[Path] = None
    routing: Optional[Path] = None
    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    patience: float = 120.0
    fresh: bool = False
    told: Callable[[str], None] = field(default=lambda line: None)


def measure(request: Request) -> Dict[str, Any]:
    """Probes, plans, runs everything. The document of `report.FORMAT`."""
    # a prompt, the tokens that are decoded, one to be predicted by the last of them
    n = request.n_prompt + request.tokens + 1
    n_ctx = request.n_ctx or -(-n // 256) * 256
    if n_ctx < n:
        raise ParameterError(f"a context of {n_ctx} is too small for {n} tokens")
    started = datetime.datetime.now(datetime.timezone.utc)
    load = os.getloadavg()[0]
    # Warmed by the text before the one that is measured: a cache that knows what is to come would be no measure.
    n_before = n - 1 if request.warm else 0
    tokens = tokens_of(request.model, n_before + n, request.text)
    sizes = measure_sizes(request.model, n_ctx, request.n_batch, request.n_ubatch, request.threads, flash_attn=False)
    routing_layers = None
    if request.routing is not None:  # a trace that cannot be followed is said before anything runs
        trace = Trace.load(request.routing)
        fit_trace(trace, sizes.info.n_expert, sizes.info.n_expert_used, 2)
        routing_layers = trace.n_layers
    weights = read_weights(request.model, sizes.info.n_expert_used)
    request.told("probing disk and cores")
    machine = measure_machine(request.model, sizes, weights, request.threads, request.fresh)
    setting = Setting(
        model=request.model,
        stock_model=request.stock_model,
        tokens=tokens.ids[n_before:],
        warm_up=tokens.ids[:n_before],
        n_prompt=request.n_prompt,
        n_ctx=n_ctx,
        n_batch=request.n_batch,
        n_ubatch=request.n_ubatch,
        threads=request.threads,
        patience=request.patience,
        text=request.text,
        routing=request.routing,
        n_expert=sizes.info.n_expert,
        n_expert_used=sizes.info.n_expert_used,
        files=_files(request.model, request.stock_model),
    )
    contenders = with_usual_read_ahead(request.contenders, request.stock_model)
    floor = _floor(request, setting, sizes, machine)
    runs, interrupted = run_all(setting, contenders, request.memories, request.rounds, request.told)
    medians = []
    for memory in request.memories:
        for contender in contenders:
            of = [r for r in runs if r["memory"] == memory and r["contender"] == contender.name]
            if not of:
                continue  # interrupted before
            row = median_row(of)
            add_roof(row, floor["ms"], machine.disk.best if machine.disk is not None else None)
            _add_plan(row, contender, request, sizes, weights, machine)
            medians.append(row)
    return {
        "format": FORMAT,
        "command": shlex.join(["hobbit", *sys.argv[1:]]),
        "started": started.isoformat(timespec="seconds"),
        "versions": _versions(),
        "model": _model(request, sizes, weights),
        "conditions": {**_conditions(request, n_ctx, tokens, contenders, runs, load), "routing_layers": routing_layers},
        "disk": _disk(machine),
        "floor": floor,
        "interrupted": interrupted,
        "rows": build_rows(medians),
        "runs": runs,
    }


def _files(*models: Path) -> Tuple[Path, ...]:
    """All parts of the models, and low-precision copies beside them."""
    out: List[Path] = []
    for model in models:
        with Source(model, load_types()) as source:
            out += source.paths
        sidecar = low_path(str(model), None)
        if sidecar is not None:
            out.append(sidecar)
    return tuple(dict.fromkeys(out))


def with_usual_read_ahead(contenders: Sequence[Contender], path: Path) -> List[Contender]:
    """After `mmap` the same at the read-ahead that is usual, where the disk has another: it changes mapped reads tenfold."""
    out: List[Contender] = []
    now = conditions.get_read_ahead(path)
    names = {c.name for c in contenders}
    for contender in contenders:
        out.append(contender)
        usual = f"mmap-{USUAL_READ_AHEAD}"
        if contender.name == "mmap" and usual not in names and now not in (None, USUAL_READ_AHEAD):
            with conditions.read_ahead(path, now) as why_not:  # may it be set?
                if why_not is None:
                    out.append(replace(contender, name=usual, read_ahead=USUAL_READ_AHEAD))
    return out


def _floor(request: Request, setting: Setting, sizes: Sizes, machine: Machine) -> Dict[str, Any]:
    """A token with every expert in memory: measured where there is room for it, else kept from before, else estimated."""
    kept = None if request.fresh or request.routing else probe.recall_floor(request.model, request.threads)
    if kept is not None:
        return {"ms": kept * 1e3, "source": "kept"}
    if sizes.largest < _memory.available():
        request.told("the compute floor: every expert in memory")
        # the same tokens twice: the first time brings the experts in
        few = setting.tokens[-FLOOR_TOKENS - 1 :]
        row = run_once(replace(setting, tokens=few, warm_up=few[:-1], n_prompt=0), RESIDENT, None)
        if "error" not in row:
            if not request.routing:
                probe.remember_floor(request.model, request.threads, 1 / row["tok_s"])
            return {"ms": 1e3 / row["tok_s"], "source": "measured"}
        request.told(f"not measured: {row['error']}")
    return {"ms": machine.compute.total * 1e3, "source": "estimated"}


def _add_plan(row: Row, contender: Contender, request: Request, sizes: Sizes, weights: Weights, machine: Machine) -> None:
    """What `hobbit plan` would have said, and how far that is from what was measured."""
    if "error" in row or contender.kind != "offload" or contender.everything or row.get("memory_budget") is None:
        return
    if contender.options.keys() - {"exact"} or contender.mode not in ("hobbit", "lru"):
        return  # settings that a plan knows nothing of
    predicts = not request.routing
    if request.routing:
        weights = replace(weights, random=False)
    mode = "exact" if contender.options.get("exact") else contender.mode
    before = request.n_prompt + (request.tokens + request.n_prompt if request.warm else 0)
    try:
        f = forecast(
            sizes, weights, machine, int(row["memory_budget"]), mode, request.tokens, after=before, predicts=predicts
        )  # fmt: skip
    except HobbitError:
        return
    row["plan"] = {
        "tok_s": f.tok_s,
        "tok_s_low": f.tok_s_low,
        "tok_s_high": f.tok_s_high,
        "mb_token": f.mb_token,
        "peak": f.peak,
        "error": f.tok_s / row["tok_s"] - 1,
        "error_mb": f.mb_token / row["mb_token"] - 1 if row["mb_token"] else 0.0,
        "in_band": f.tok_s_low <= row["tok_s"] <= f.tok_s_high,
    }


def _versions() -> Dict[str, str]:
    return {
        "hobbit_cpp": hobbit_cpp.__version__,
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "llama_cpp": _lib.upstream_commit,
        "python": platform.python_version(),
        "kernel": conditions.kernel(),
    }


def _model(request: Request, sizes: Sizes, weights: Weights) -> Dict[str, Any]:
    info = sizes.info
    return {
        "path": str(request.model),
        "stock_path": str(request.stock_model),
        "name": weights.name,
        "bytes": info.bytes_dense + info.bytes_high,
        "bytes_dense": info.bytes_dense,
        "bytes_high": info.bytes_high,
        "bytes_low": info.bytes_low,
        "layers": info.n_moe_layer,
        "experts": info.n_expert,
        "used": info.n_expert_used,
        "random_weights": weights.random,
    }


def _conditions(
    request: Request, n_ctx: int, tokens: Tokens, contenders: Sequence[Contender], runs: Sequence[Row], load: float
) -> Dict[str, Any]:
    return {
        "cpu": probe.cpu_name(),
        "cores": _memory.cores(),
        "threads": request.threads,
        "memory_total": _memory.total(),
        "load_average": load,
        "start": "warm" if request.warm else "cold",
        "page_cache": runs[0]["page_cache"],
        "text": tokens.source,
        "text_sha256": tokens.sha256,
        "tokens": request.tokens,
        "prompt_tokens": request.n_prompt,
        "ctx": n_ctx,
        "batch": request.n_batch,
        "ubatch": request.n_ubatch,
        "rounds": request.rounds,
        "order": [[c.name for c in order] for order in abba(contenders, request.rounds)],
        "read_ahead": conditions.get_read_ahead(request.stock_model),
        "routing": None if request.routing is None else request.routing.name,
    }


def _disk(machine: Machine) -> Optional[Dict[str, Any]]:
    disk = machine.disk
    if disk is None:
        return None
    return {
        "read_bytes": disk.read_bytes,
        "bandwidth": disk.bandwidth,
        "best": disk.best,
        "best_depth": disk.best_depth,
        "direct": disk.direct,
    }
