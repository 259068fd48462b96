"""Flags that commands share, and the model and the sampling behind them.

A command calls `add_model_flags` and `add_sampling_flags` on its parser, and `load_model` and `sampling_of` on what was
parsed. Names and defaults are llama.cpp's where it has the same.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from hobbit_cpp._batches import COMMON, COMMON_NOT_LENT
from hobbit_cpp._memory import MOST_THREADS, cores

from .output import check_writable

__all__ = [
    "add_batch_flags",
    "add_json_stats_flag",
    "add_model_flags",
    "add_sampling_flags",
    "add_threads_flag",
    "batch_sizes",
    "check_json_stats",
    "check_model_flags",
    "load_model",
    "offload_of",
    "positive",
    "sampling_of",
    "threads",
    "whole",
]


# That say how experts are offloaded.
_OFFLOAD_FLAGS = (
    "expert_cache",
    "exact",
    "precision_rule",
    "drop_fraction",
    "max_experts",
    "low_model",
    "quality",
    "calibration",
)


def add_model_flags(parser: argparse.ArgumentParser, ctx_size: int = 4096) -> None:
    """The model, how it is run, and --verbose. `ctx_size`: the default of -c."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF; of a split one the first part")
    group = parser.add_argument_group("model")
    group.add_argument("--offload", choices=["hobbit", "fate", "lru", "none"], default="hobbit", help="default: hobbit")
    group.add_argument("--memory", metavar="SIZE", help="budget of the process: 4GiB, 50%%, or bytes")
    group.add_argument("--expert-cache", metavar="SIZE", help="of that for experts (default: what is left)")
    group.add_argument("--exact", action="store_true", help="every expert in high precision: the same text as llama.cpp")
    group.add_argument(
        "--precision-rule",
        choices=["miss", "weight", "drop"],
        help="on a cache miss (default), or by scores alone: reproducible; drop: no low precision, skip on a miss",
    )
    group.add_argument(
        "--drop-fraction", metavar="F", type=float, help="of drop: skip what has less than F/k of a token's router weight"
    )
    group.add_argument(
        "--max-experts", metavar="N", type=positive, help="most experts a token (default: what the router selects)"
    )
    group.add_argument(
        "--low-model",
        metavar="FILE",
        help="sidecar with the low-precision copies; none: no sidecar (default: MODEL.low.gguf if it is there)",
    )
    group.add_argument(
        "--quality",
        metavar="Q",
        help="exact; 1%%: perplexity at most 1 %% above exact, by the model's calibration (hobbit calibrate); 40MB/token: read, "
        "on average; paper: thresholds as HOBBIT has them (default: 1.5%% with a calibration, else paper)",
    )
    group.add_argument(
        "--calibration", metavar="FILE", help="of hobbit calibrate; none: none (default: MODEL.calibration.json if it is there)"
    )
    group.add_argument("--no-heat", action="store_true", help="begin cold: neither use nor keep which experts are used most")
    group.add_argument("--no-yield", action="store_true", help="keep the expert pool when memory gets short on this machine")
    context = f"default: {ctx_size}; 0: the model's"
    group.add_argument("-c", "--ctx-size", metavar="N", type=whole, default=ctx_size, help=context)
    add_threads_flag(group)
    group.add_argument("-tb", "--threads-batch", metavar="N", type=threads, help="threads for the prompt (default: as -t)")
    add_batch_flags(group)
    group.add_argument(
        "-fa",
        "--flash-attn",
        choices=["on", "off"],
        default="on",
        help="attention by tiles (default: on): with a long context it leaves more memory for experts, and is faster",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's log; a traceback when something fails")


def add_threads_flag(group: Any) -> None:
    """-t, of which there is always a value."""
    n = cores()
    group.add_argument("-t", "--threads", metavar="N", type=threads, default=n, help=f"threads (default: one a core: {n})")


def add_batch_flags(group: Any) -> None:
    """-b and -ub; what they come to `batch_sizes` says."""
    group.add_argument(
        "-b",
        "--batch-size",
        metavar="N",
        type=positive,
        help=f"tokens of a prompt computed at once, for which each expert is read once (default: {COMMON}; where the "
        f"pool cannot lend the memory, and with -fa off, {COMMON_NOT_LENT}); where memory is short fewer",
    )
    group.add_argument("-ub", "--ubatch-size", metavar="N", type=positive, help="of these, by llama.cpp (default: all)")


def batch_sizes(args: argparse.Namespace) -> tuple[int, int]:
    """n_batch and n_ubatch: by default the larger where the pool lends what they take, and llama.cpp's ubatch where it cannot."""

    def given(name: str, otherwise: Any = None) -> Any:
        return getattr(args, name, otherwise)

    lent = given("offload") != "fate" and given("expert_cache") is None and not given("embedding") and not given("logprobs")
    usual = COMMON if lent and given("flash_attn", "on") == "on" else COMMON_NOT_LENT
    n_batch = args.batch_size or usual
    return n_batch, args.ubatch_size or n_batch


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("-n", "--n-predict", metavar="N", type=_most_tokens, default=-1, help="most tokens; -1: until the end")
    group.add_argument("-s", "--seed", metavar="N", type=int, default=-1, help="-1: random")
    group.add_argument("--temp", metavar="X", type=float, default=0.8, help="default: 0.8; 0: greedy")
    group.add_argument("--top-k", metavar="N", type=int, default=40, help="default: 40; 0: off")
    group.add_argument("--top-p", metavar="X", type=float, default=0.95, help="default: 0.95; 1: off")
    group.add_argument("--min-p", metavar="X", type=float, default=0.05, help="default: 0.05; 0: off")
    group.add_argument("--repeat-penalty", metavar="X", type=float, default=1.0, help="default: 1 (off)")


def add_json_stats_flag(parser: argparse.ArgumentParser) -> None:
    """--json-stats, for commands that measure; `check_json_stats` before the work."""
    parser.add_argument("--json-stats", metavar="FILE", type=Path, help="write times and statistics as JSON")


def check_json_stats(args: argparse.Namespace) -> None:
    """An hour of work must not end in a file that cannot be written."""
    check_writable(args.json_stats, args.model, getattr(args, "file", None))


def check_model_flags(args: argparse.Namespace) -> None:
    """What argparse cannot see."""
    if args.exact and args.precision_rule is not None:
        raise ValueError("--exact leaves nothing to --precision-rule: give one of them")
    if args.offload == "none":
        given = [name for name in _OFFLOAD_FLAGS if getattr(args, name) not in (None, False, "none")]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags} means nothing with --offload none")
    if (args.precision_rule == "drop") != (args.drop_fraction is not None):
        raise ValueError("--precision-rule drop and --drop-fraction F go together")


def offload_of(args: argparse.Namespace) -> Any:
    """`OffloadParams` behind the flags of `add_model_flags`; None for --offload none."""
    if args.offload == "none":
        return None
    from hobbit_cpp import OffloadParams

    given = {
        "exact": args.exact or None,
        "precision_rule": args.precision_rule,
        "drop_fraction": args.drop_fraction,
        "max_experts": args.max_experts,
        "expert_cache": args.expert_cache,
        "low_model": args.low_model,
        "quality": args.quality,
        "calibration": args.calibration,
        "heat": False if args.no_heat else None,
        "yield_memory": False if args.no_yield else None,
    }
    return OffloadParams(mode=args.offload, **{k: v for k, v in given.items() if v is not None})


def load_model(args: argparse.Namespace, model_class: Any = None, **more: Any) -> Any:
    """The `hobbit_cpp.Llama` (or `model_class`) behind the flags of `add_model_flags`; `more`: further arguments of it.

    Raises:
        ValueError: flags that exclude each other.
        FileNotFoundError: there is no such model.
    """
    check_model_flags(args)
    if not args.model.exists():
        raise FileNotFoundError(f"{args.model}: no such file")
    from hobbit_cpp import Llama

    n_batch, n_ubatch = batch_sizes(args)
    options: dict[str, Any] = {
        "offload": offload_of(args),
        "memory": args.memory,
        "n_ctx": args.ctx_size,
        "n_threads": args.threads,
        "n_threads_batch": args.threads_batch or args.threads,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "flash_attn": args.flash_attn == "on",
        "verbose": args.verbose,
    }
    return (model_class or Llama)(str(args.model), **{**options, **more})


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_sampling_flags` as arguments of `create_completion` and `create_chat_completion`.

    A seed below 0 becomes a random one, drawn at each call.
    """
    return {
        "max_tokens": args.n_predict if args.n_predict > 0 else None,
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
        "seed": args.seed if args.seed >= 0 else random.SystemRandom().getrandbits(31),
    }


def _most_tokens(text: str) -> int:
    n = int(text)
    if n < 1 and n != -1:
        raise argparse.ArgumentTypeError(f"{n} is neither a positive number nor -1")
    return n


def positive(text: str) -> int:
    """For argparse: a number above 0."""
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{n} is not a positive number")
    return n


def threads(text: str) -> int:
    """For argparse: as many as ggml takes, which ends the process for more."""
    n = positive(text)
    if n > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{n} is more than llama.cpp's {MOST_THREADS}: as many as there are cores is best")
    return n


def whole(text: str) -> int:
    """For argparse: a number from 0."""
    n = int(text)
    if n < 0:
        raise argparse.ArgumentTypeError(f"{n} is negative")
    if n >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{n} is too large")
    return n
