"""One contender over one text, in this process: python -m hobbit_cpp.bench.worker JOB.json writes its result into job["result"].

A process of its own, so that nothing of one contender (memory, threads, page cache) helps or hinders another.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Tuple

from hobbit_cpp import _memory

__all__ = ["main", "run"]


def _load(job: Dict[str, Any]) -> Any:
    from hobbit_cpp import Llama, OffloadParams

    kwargs: Dict[str, Any] = {
        "n_ctx": job["n_ctx"],
        "n_batch": job["n_batch"],
        "n_ubatch": job["n_ubatch"],
        "n_threads": job["threads"],
        "n_threads_batch": job["threads"],
        "verbose": False,
        "seed": 1,
    }
    if job["kind"] == "stock":
        if job["repack"]:
            return Llama(job["model"], use_mmap=job["mmap"], **kwargs)

        class Plain(Llama):
            """Stock llama.cpp, told to leave weights as they are in the file."""

            @property
            def model_params(self) -> Any:
                params = super().model_params
                params.use_extra_bufts = False
                return params

            @model_params.setter
            def model_params(self, value: Any) -> None:
                Llama.model_params.fset(self, value)  # type: ignore[attr-defined]

        return Plain(job["model"], use_mmap=job["mmap"], **kwargs)
    # A cold run is cold, and its memory is what the row says, unless the contender's name asks for it.
    params = OffloadParams(mode=job["mode"], **{"heat": False, "yield_memory": False, **job["options"]})
    cache = "100%" if job["everything"] else None
    return Llama(job["model"], offload=params, memory=job["memory"], expert_cache=cache, **kwargs)


def _disk_bytes(kind: str) -> int:
    """Bytes that this process had read from ("read") or written to ("write") a disk, page faults included."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith(f"{kind}_bytes:"):
                return int(line.split()[1])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_inblock if kind == "read" else usage.ru_oublock) * 512


def _thread_seconds(name: str) -> float:
    """CPU seconds of our threads of this name."""
    total = 0.0
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                head, _, rest = (task / "stat").read_text().rpartition(")")
                if head.partition("(")[2] == name:
                    fields = rest.split()
                    total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _stats(llm: Any, seconds: float) -> Dict[str, Any]:
    """The offload's own figures of one phase."""
    s = llm.offload_stats()
    n = max(s.selections, 1)
    tokens = max(s.n_tokens, 1)
    out: Dict[str, Any] = {
        "mb_token": s.bytes_per_token / 1e6,
        "mb_wasted_token": s.bytes_wasted / tokens / 1e6,
        "hit_rate": s.hit_rate,
        "late_rate": s.prefetches_late / n,
        "hit_rate_high": s.hits_high / n,
        "hit_rate_low": s.hits_low / n,
        "share_high": s.share_high,
        "share_low": s.share_low,
        "share_skipped": s.share_skipped,
        "loads_high": s.loads_high / n,
        "loads_low": s.loads_low / n,
        "mass_low": s.mass_low / max(s.mass_total, 1e-9),
        "mass_skipped": s.mass_skipped / max(s.mass_total, 1e-9),
        "stall_share": s.stall_seconds / max(s.eval_seconds, 1e-9),
        "stall_ms": s.stall_seconds / tokens * 1e3,
        "expert_ms": s.expert_seconds / tokens * 1e3,
        "prefetches": s.prefetches,
        "prefetches_useful": s.prefetches_useful,
        "prefetches_late": s.prefetches_late,
        "prefetches_wasted": s.prefetches_wasted,
        "slots_high": s.slots_high,
        "slots_low": s.slots_low,
        "pool_bytes": s.pool_bytes,
        "memory_budget": s.memory_budget,
        "direct_io": s.direct_io,
        "read_gb_s": s.bytes_read / max(seconds, 1e-9) / 1e9,
    }
    if s.recall:
        out["recall"] = s.recall[min(s.recall)]
    return out


@dataclass
class _Decoded:
    """Seconds of each token, the sum of negative log-likelihoods, and CPU seconds of all threads while tokens were computed."""

    laps: List[float] = field(default_factory=list)
    nll: float = 0.0
    user: float = 0.0
    system: float = 0.0


def _decode(llm: Any, tokens: List[int], patience: float) -> _Decoded:
    """Feeds all tokens but the last, one at a time."""
    import numpy as np

    out = _Decoded()
    for now, then in zip(tokens, tokens[1:]):
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.perf_counter()
        llm.eval([now])
        out.laps.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_SELF)
        out.user += after.ru_utime - before.ru_utime
        out.system += after.ru_stime - before.ru_stime
        row = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).astype(np.float64)
        out.nll += float(np.logaddexp.reduce(row) - row[then])
        if sum(out.laps) > patience:
            break
    return out


def _trace(job: Dict[str, Any]) -> Tuple[Any, str]:
    """The routing to follow, made to fit, or None; and what was done to make it fit.

    Before the model is loaded: the budget is no place for the whole trace.
    """
    if not job["routing"]:
        return None, ""
    from hobbit_cpp.trace import Trace

    from .replayed import fit_trace

    return fit_trace(Trace.load(job["routing"]), job["n_expert"], job["n_expert_used"], len(job["tokens"]))


def run(job: Dict[str, Any]) -> Dict[str, Any]:
    """Loads, warms where asked, measures the prompt and the tokens after it."""
    trace, note = _trace(job)
    begin = time.perf_counter()
    llm = _load(job)
    loaded = time.perf_counter() - begin
    offloaded = job["kind"] == "offload"
    tokens: List[int] = job["tokens"]
    n_prompt: int = job["n_prompt"]
    if trace is not None:
        llm.set_routing(trace)
    if job["warm_up"]:
        if n_prompt:
            llm.eval(job["warm_up"][:n_prompt])
        # n tokens are fed for n + 1 given
        wanted = job["warm_up"][n_prompt:]
        fed = len(_decode(llm, [*wanted, tokens[0]], job["patience"]).laps)
        if fed < len(wanted):
            note = "; ".join(filter(None, [note, f"warmed by {fed} tokens, not {len(wanted)}: slower than --patience allows"]))
        llm.reset()
        if trace is not None:
            llm.set_routing(trace)  # from its beginning
    out: Dict[str, Any] = {"load_s": loaded, "note": note}
    if offloaded:
        llm.reset_offload_stats()
    if n_prompt:
        begin = time.perf_counter()
        llm.eval(tokens[:n_prompt])
        seconds = time.perf_counter() - begin
        out.update(prompt_s=seconds, prompt_tok_s=n_prompt / seconds)
        if offloaded:
            out["prompt_mb_token"] = _stats(llm, seconds)["mb_token"]
            llm.reset_offload_stats()

    reads, predicting = _disk_bytes("read"), _thread_seconds("hobbit-predict")
    decoded = _decode(llm, tokens[n_prompt:], job["patience"])
    n, seconds, nll = len(decoded.laps), sum(decoded.laps), decoded.nll
    half = decoded.laps[n // 2 :]
    out.update(
        n_tokens=n,
        tok_s=n / seconds,
        tok_s_last_half=len(half) / sum(half),
        first_token_s=out.get("prompt_s", 0.0) + (0.0 if n_prompt else decoded.laps[0]),
        user_ms=decoded.user / n * 1e3,
        system_ms=decoded.system / n * 1e3,
        # of fewer tokens it would be that of another text; a model that is damaged has none
        perplexity=math.exp(nll / n) if n == len(tokens) - n_prompt - 1 and nll / n < 700 else None,
        disk_mb_token=(_disk_bytes("read") - reads) / n / 1e6,
    )
    if offloaded:
        out.update(_stats(llm, seconds))
        out["prediction_ms"] = (_thread_seconds("hobbit-predict") - predicting) / n * 1e3
    out["disk_written_mb"] = _disk_bytes("write") / 1e6
    out["peak_rss"] = _memory.peak_resident()
    llm.close()
    return out


def main() -> int:
    """The program. An error is one line on stderr."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    written = Path(job["result"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = run(job)
        except Exception as e:
            if os.environ.get("HOBBIT_DEBUG", "") not in ("", "0"):
                raise
            print(" ".join(f"{e}".split()) or type(e).__name__, file=sys.stderr)
            return 1
    written.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
