"""hobbit eval: what a setting costs in quality, and what it saves."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._progress import StepProgress, make_progress
from . import options
from .output import check_writable, write_json

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="measure quality: perplexity, distance to exact mode, multiple choice",
        description="Measures the model as the flags say beside exact mode, or several settings (--against) side by side.",
    )
    options.add_model_flags(parser, ctx_size=512)
    group = parser.add_argument_group("what is measured (-c: tokens of a window of the text)")
    group.add_argument("--text", metavar="FILE", type=Path, help="a text to predict")
    group.add_argument("--tokens", metavar="N", type=options.positive, default=512, help="predictions scored; default: 512")
    group.add_argument(
        "--warmup", metavar="N", type=options.whole, default=128, help="tokens before, that fill the cache; default: 128"
    )
    group.add_argument(
        "--skip", metavar="N", type=options.whole, default=0, help="predictions at the start of each window that are not scored"
    )
    group.add_argument("--questions", metavar="FILE", type=Path, help="multiple choice in ARC's JSONL")
    group.add_argument("--question-limit", metavar="N", type=options.positive, help="only the first N")
    group.add_argument("--one-by-one", action="store_true", help="one token per decode also where no rule depends on the cache")
    group = parser.add_argument_group("settings side by side")
    group.add_argument(
        "--against",
        metavar="LIST",
        help="of exact, low[=T1:T2], weight[=T1:T2], drop[=F], topk[=K], with commas; drop and topk without a value are tuned to "
        "read as many MB a token as low",
    )
    group.add_argument("--tune-tokens", metavar="N", type=options.positive, default=128, help="text for that; default: 128")
    group.add_argument("--target-mb", metavar="MB", type=float, help="tune to this many MB a token instead")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", type=Path, help="write all figures; - for stdout")
    group.add_argument("--scratch", metavar="DIR", type=Path, help="for predictions of exact mode: 2 bytes a token and word")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Measures."""
    check_writable(args.json, args.model, args.text, args.questions)
    if args.text is None and args.questions is None:
        raise ValueError("nothing to measure: give --text FILE, --questions FILE, or both")
    if args.ctx_size < 2:
        raise ValueError("a window (-c) needs two tokens at least")
    if args.target_mb is not None and args.target_mb <= 0:
        raise ValueError("--target-mb must be above 0")
    options.check_model_flags(args)
    for path in (args.model, args.text, args.questions):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
    from hobbit_cpp.evaluate import questions as q
    from hobbit_cpp.evaluate import run as measure
    from hobbit_cpp.evaluate import table
    from hobbit_cpp.evaluate.compare import Plan

    plan = Plan(
        settings=settings_of(args),
        text=args.text,
        n_tokens=args.tokens,
        warmup=args.warmup,
        window=args.ctx_size,
        skip=args.skip,
        questions=q.read_questions(args.questions, args.question_limit) if args.questions is not None else (),
        tune_tokens=args.tune_tokens,
        target=args.target_mb * 1e6 if args.target_mb is not None else None,
        as_is=args.against is None and args.precision_rule is None,
        one_by_one=args.one_by_one,
        scratch=args.scratch,
    )
    with _Progress() as progress:
        result = {**about(args), **measure(plan, _opener(args), progress)}
    try:
        if args.json is not None:
            write_json(args.json, result)
    finally:
        if str(args.json) != "-":
            from rich.console import Console

            table.show(result, Console() if sys.stdout.isatty() else Console(width=120))
    return 130 if result["interrupted"] else 0


def settings_of(args: argparse.Namespace) -> list[Any]:
    """What is compared; empty without offload."""
    from hobbit_cpp.evaluate.settings import Setting, exact_setting, kind_of, parse_setting

    if args.offload == "none":
        if args.against is not None:
            raise ValueError("--against needs the engine: leave --offload none out")
        return []
    # Each setting begins as cold as the others, and has the same pool.
    params = replace(options.offload_of(args), heat=False, yield_memory=False)
    if args.against is None:
        kind = kind_of(params)
        exact = exact_setting(params)
        return [exact] if kind == "exact" else [exact, Setting(kind, kind, params)]
    if args.exact or args.precision_rule is not None or args.max_experts is not None:
        raise ValueError("--against names the settings itself: leave --exact, --precision-rule and --max-experts out")
    names = [name.strip() for name in args.against.split(",") if name.strip()]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"--against {args.against!r}: name each setting once")
    return [parse_setting(name, params) for name in names]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What is not the model's to say."""
    import hobbit_cpp
    from hobbit_cpp._memory import processors

    return {
        "hobbit": hobbit_cpp.__version__,
        "model": str(args.model),
        "model_bytes": args.model.stat().st_size,
        "memory": args.memory,
        "threads": args.threads,
        "processors": len(processors()),
    }


def _opener(args: argparse.Namespace) -> Any:
    from hobbit_cpp.evaluate.scorer import LlamaScorer

    def load(setting: Any, n_ctx: int, width: int, pool: int | None) -> Any:
        offload = None
        if setting is not None:
            offload = setting.params if pool is None else replace(setting.params, expert_cache=pool)
        sizes = {"n_ctx": n_ctx, "n_batch": width, "n_ubatch": width}
        return options.load_model(args, model_class=LlamaScorer, offload=offload, **sizes)

    return load


class _Progress:
    """A bar on a terminal; elsewhere a line for each piece of work, and now and then how far it is."""

    def __init__(self) -> None:
        self._steps = StepProgress()
        self._done = self._total = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()

    def phase(self, name: str, total: int) -> None:
        if not sys.stderr.isatty():
            print(f"{name} ({total})" if total > 1 else name, file=sys.stderr, flush=True)
        self._steps.close()
        self._steps = make_progress(name, "steps")
        self._done, self._total = 0, total
        self.step(0)

    def step(self, n: int) -> None:
        self._done += n
        self._steps.update(self._done, self._total)
