"""Speed and quality over memory: a CSV, and one picture with all contenders."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from hobbit_cpp._files import replacing
from hobbit_cpp._memory import parse_size
from hobbit_cpp.errors import ParameterError

__all__ = ["csv_text", "draw", "have_matplotlib", "parse_sweep"]

_STEPS = 6
COLUMNS = (
    "contender", "memory", "memory_share", "tok_s", "tok_s_min", "tok_s_max", "prompt_tok_s", "perplexity", "mb_token",
    "disk_mb_token", "hit_rate", "share_low", "share_skipped", "bound_share", "peak_rss", "capped", "error",
)  # fmt: skip


def parse_sweep(text: str, whole: int) -> List[int]:
    """ "memory=10%..100%" or "memory=1GiB..4GiB:5" (so many steps) -> bytes, rising. Percentages are of `whole`.

    Raises:
        ParameterError: something else.
    """
    found = re.fullmatch(r"memory=([^.:]+(?:\.\d+[^.:]*)?)\.\.([^:]+?)(?::(\d+))?", text.strip())
    if not found:
        raise ParameterError(f"--sweep {text!r}: write memory=10%..100% or memory=1GiB..4GiB:5 (5 steps)")
    first, last = (parse_size(found[i], of=whole) for i in (1, 2))
    steps = int(found[3]) if found[3] else _STEPS
    if first >= last or steps < 2:
        raise ParameterError(f"--sweep {text!r}: it must rise, in two steps or more")
    return [round(first + (last - first) * i / (steps - 1)) for i in range(steps)]


def csv_text(rows: Sequence[Dict[str, Any]], whole: int) -> str:
    """One line for each contender and memory."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "memory_share": f"{row['memory'] / whole:.4f}"})
    return out.getvalue()


def have_matplotlib() -> bool:
    """Whether a picture can be drawn."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _series(rows: Sequence[Dict[str, Any]], name: str, key: str) -> Tuple[List[float], List[float]]:
    points = sorted((r["memory"], r[key]) for r in rows if r["contender"] == name and isinstance(r.get(key), (int, float)))
    return [m / (1 << 30) for m, _ in points], [value for _, value in points]


def draw(path: Path, rows: Sequence[Dict[str, Any]], title: str, subtitle: str) -> None:
    """Two panels over the same memory: tokens a second, and perplexity over the same tokens. Needs matplotlib."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 7), height_ratios=(3, 2))
    for name in dict.fromkeys(row["contender"] for row in rows):
        for axis, key in zip(axes, ("tok_s", "perplexity")):
            x, y = _series(rows, name, key)
            if not x:
                continue
            (line,) = axis.plot(x, y, marker="o", label=name)
            if key == "tok_s":
                low, high = (_series(rows, name, k)[1] for k in ("tok_s_min", "tok_s_max"))
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    axes[0].set_ylabel("tokens/s")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    axes[1].set_ylabel("perplexity")
    axes[1].set_xlabel("memory, GiB")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].set_title(f"{title}\n{subtitle}", fontsize=9)
    figure.tight_layout()
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix.lstrip(".") or "png", dpi=130)
    finally:
        plt.close(figure)
