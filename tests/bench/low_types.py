"""Which low type for which high type: what each costs in quality, bytes and compute, beside skipping the expert.

    python tests/bench/low_types.py MODEL --calibration FILE --text FILE [--high Q8_0,Q4_K] [--low ...] [--json OUT]

For each high type the predictions of exact mode, then those with what `--weight T1:T2` (default 0:1: all but the first expert
of a token) serves low: by router weight alone, so that the same selections are low with every type, whatever is cached. Without
an importance matrix, with one of the calibration text (TYPE+imatrix), or with the inputs of its tokens as well, for error
feedback (TYPE+feedback). `skip` does without these selections. The copies are made of the experts in the high type; with
`--every N` only in every Nth layer, which takes less time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple
from unittest import mock

from hobbit_cpp.convert import convert, job
from hobbit_cpp.convert.ggtypes import load_types
from hobbit_cpp.convert.plan import make_plan
from hobbit_cpp.evaluate import text as t
from hobbit_cpp.evaluate.scorer import LlamaScorer
from hobbit_cpp.evaluate.settings import exact_setting, parse_setting
from hobbit_cpp.imatrix import INPUTS, record_imatrix
from hobbit_cpp.params import OffloadParams
from hobbit_cpp.probe import probe_compute

LOWS = (
    "Q4_0,Q4_0+imatrix,Q2_0,Q3_K,Q3_K+imatrix,Q2_K,Q2_K+imatrix,IQ2_S+imatrix,IQ3_XXS+imatrix,IQ2_XXS+imatrix,IQ4_NL+imatrix,"
    "IQ2_XS+imatrix,IQ4_NL,IQ3_XXS,IQ2_S,Q4_0+feedback,IQ4_NL+feedback,Q3_K+feedback,Q2_K+feedback"
)
INPUTS_KEPT = {"imatrix": 0, "feedback": INPUTS}
WIDTH = 128
# Of the kernels: an expert's up projection in Qwen3-30B-A3B.
N_IN, N_OUT = 2048, 768


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.types = load_types()
        self.base = OffloadParams(expert_cache="100%", prefetch_depth=0)
        self.passage: Optional[t.Passage] = None

    def path(self, name: str) -> Path:
        return self.work / name

    def matrix(self, how: str) -> Optional[Path]:
        if not how:
            return None
        out = self.path(f"{how}.gguf")
        if not out.exists():
            text = self.args.calibration.read_text(encoding="utf-8")
            report = record_imatrix(
                self.args.model,
                text,
                out,
                n_tokens=self.args.calibration_tokens,
                inputs=INPUTS_KEPT[how],
                dataset="calibration",
            )
            print(f"importance matrix: {report}", file=sys.stderr, flush=True)
        return out

    def sidecar(self, model: Path, low: str, matrix: Optional[Path]) -> Tuple[Path, float]:
        """Low-precision copies of a model, and the CPU seconds that they took to make."""
        out = self.path("side.low.gguf")
        begin = time.process_time()
        with mock.patch.object(job, "make_plan", self.plan):
            convert(model, out, sidecar=True, low=low, imatrix=matrix or "none", force=True, progress=False)
        return out, time.process_time() - begin

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """In the layers that are left out, the copies are those in high precision."""
        plan, every = make_plan(*args, **kwargs), self.args.every
        outputs = (o if int(o.name.split(".")[3]) % every == 0 else replace(o, type=o.source.type) for o in plan.outputs)
        return replace(plan, outputs=tuple(outputs))

    def score(self, model: Path, setting: Any, low_model: Any = False, **kwargs: Any) -> t.TextScores:
        sizes = {"n_ctx": self.args.window, "n_batch": WIDTH, "n_ubatch": WIDTH}
        scorer: Any = LlamaScorer(str(model), offload=setting.params, low_model=low_model, verbose=False, **sizes)
        try:
            if self.passage is None:
                self.passage = t.read_passage(scorer, self.args.text, self.args.tokens, 0, self.args.window, self.args.skip)
            return t.score_text(scorer, self.passage, WIDTH, lambda _: None, **kwargs)
        finally:
            scorer.close()

    def rows(self) -> Iterator[Dict[str, Any]]:
        t1 = self.args.weight.split(":")[0]
        for high in self.args.high.split(","):
            model, bits = self.path(f"{high}.gguf"), self.types.target(high).bits
            if not model.exists():
                convert(self.args.model, model, high=high, low="none", imatrix="none", progress=False)
            log_probs = t.LogProbs(self.work)
            exact = self.score(model, exact_setting(self.base), keep=log_probs)
            yield {"high": high, "low": "exact", "by": "", "bits": bits, "share": 0.0, **figures(exact, None)}
            if self.args.every == 1:  # the rule asks for copies also where it skips
                side, _ = self.sidecar(model, "Q2_0", None)
                skip = parse_setting(f"weight={t1}:{t1}", self.base)
                scores = self.score(model, skip, low_model=side, against=log_probs)
                yield {**row(high, "skip", "", 0.0, 0.0, scores, exact), "made_cpu_seconds": 0.0}
            for name in self.args.low.split(","):
                low, _, how = name.partition("+")
                info = self.types.target(low, imatrix=True)
                if info.bits >= bits or how not in ("", *INPUTS_KEPT):
                    continue
                side, took = self.sidecar(model, low, self.matrix(how))
                rule = parse_setting(f"weight={self.args.weight}", self.base)
                scores = self.score(model, rule, low_model=side, against=log_probs)
                yield {**row(high, low, how, info.bits, info.bits / bits, scores, exact), "made_cpu_seconds": took}
            log_probs.close()


def row(high: str, low: str, by: str, bits: float, of_high: float, scores: t.TextScores, exact: t.TextScores) -> Dict[str, Any]:
    n = max(scores.counts.selections, 1)
    share = (scores.counts.hits_low + scores.counts.loads_low + scores.counts.skips) / n
    return {
        "high": high, "low": low, "by": by, "bits": bits, "bytes_of_high": of_high, "share": share,
        **figures(scores, exact),
    }  # fmt: skip


def figures(scores: t.TextScores, exact: Optional[t.TextScores]) -> Dict[str, Any]:
    return {k: v if isinstance(v, int) else vars(v) for k, v in t.summarise(scores, exact).items()}


def kernels(names: List[str], threads: int, fresh: bool) -> Dict[str, Dict[str, float]]:
    """For each type the bytes of weights a second of ggml's kernel for one token, and the microseconds of an expert."""
    types, out = load_types(), {}
    for name in names:
        info = types.target(name, imatrix=True)
        rate = probe_compute(info.id, N_IN, N_OUT, threads, fresh=fresh)
        if rate is None:
            continue
        out[name] = {"bytes_per_second": rate, "expert_us": 1e6 * 3 * N_OUT * info.row_bytes(N_IN) / rate}
    return out


def cell(value: Dict[str, float], scale: float, digits: int) -> str:
    half = (value["high"] - value["low"]) / 2
    return f"{scale * value['value']:.{digits}f} ± {scale * half:.{digits}f}"


def table(rows: List[Dict[str, Any]], speed: Dict[str, Dict[str, float]]) -> str:
    """As Markdown."""
    lines = [
        "| high | low | bits | of high | by | KL, nats | perplexity, % | top-1, % | expert, µs | made, CPU s |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        us = f"{speed[r['low']]['expert_us']:.0f}" if r["low"] in speed else ""
        if "kl" not in r:
            us = f"{speed[r['high']]['expert_us']:.0f}" if r["high"] in speed else ""
            exact = f"exact: perplexity {r['perplexity']['value']:.2f}"
            lines.append(f"| {r['high']} | {exact} | {r['bits']:.2f} | 1 | | | | | {us} | |")
            continue
        lines.append(
            f"| {r['high']} | {r['low']} | {r['bits']:.2f} | {r['bytes_of_high']:.2f} | {r['by']} | "
            f"{cell(r['kl'], 1, 4)} | {cell(r['perplexity_change'], 100, 2)} | {100 * r['top1_agreement']['value']:.1f} | {us} | "
            f"{r['made_cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="experts in F16 or Q8_0, rows that 256 divides")
    parser.add_argument("--calibration", metavar="FILE", type=Path, required=True, help="text of the importance matrix")
    parser.add_argument("--calibration-tokens", metavar="N", type=int, default=16384)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="text that is predicted: another one")
    parser.add_argument("--tokens", metavar="N", type=int, default=4096)
    parser.add_argument("--window", metavar="N", type=int, default=512)
    parser.add_argument("--skip", metavar="N", type=int, default=64, help="predictions at the start of a window not scored")
    parser.add_argument("--weight", metavar="T1:T2", default="0:1", help="what is low: see precision_rule='weight'")
    parser.add_argument("--high", default="Q8_0,Q4_K")
    parser.add_argument("--low", default=LOWS)
    parser.add_argument("--every", metavar="N", type=int, default=1, help="low-precision copies in every Nth layer alone")
    parser.add_argument("--work", metavar="DIR", type=Path, required=True, help="for the files made; those there are used again")
    parser.add_argument("--kernels", action="store_true", help="measure only the kernels, anew; later runs use these figures")
    parser.add_argument("--json", metavar="OUT", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name.partition("+")[0] for name in f"{args.high},{args.low}".split(",")))
    threads = len(os.sched_getaffinity(0))
    if args.kernels:
        print(json.dumps(kernels(names, threads, fresh=True), indent=1))
        return
    rows: List[Dict[str, Any]] = []
    for found in Bench(args).rows():
        rows.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
        if args.json is not None:
            conditions = {k: str(v) for k, v in vars(args).items()}
            document = {"conditions": conditions, "threads": threads, "rows": rows}
            args.json.write_text(json.dumps(document, indent=1))
    print(table(rows, kernels(names, threads, fresh=False)))


if __name__ == "__main__":
    main()
