"""The document that --json writes, and the tables in the terminal."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from hobbit_cpp._memory import human

__all__ = ["FORMAT", "build_rows", "condition_lines", "print_report", "row_lines"]

FORMAT = 1
"""Of the document. Keys are added, never renamed.

format, command, started (UTC)
versions: hobbit_cpp, llama_cpp_python, llama_cpp (commit), python, kernel
model: path, stock_path, name, bytes, bytes_dense, bytes_high, bytes_low, layers, experts, used, random_weights
conditions: cpu, cores, threads, memory_total, load_average (before it began), start ("cold" or "warm"), page_cache,
    text, text_sha256, tokens, prompt_tokens, ctx, batch, ubatch, rounds, order (of the contenders, by round),
    read_ahead (KiB), routing, routing_layers (of that trace; they repeat where the model has more)
disk: read_bytes, bandwidth (bytes/s by queue depth), best, best_depth, direct; or null
floor: ms (a token with every expert in memory), source ("measured", "kept" from before, or "estimated")
interrupted: 0, or the exit code of what ended it early: 130 (Ctrl-C), 143 (SIGTERM)
rows: medians of the runs of one contender at one memory:
    contender, kind ("offload", "stock", "command"), memory (bytes), capped, cap (how, or why not), runs, failed, notes;
    error alone when all runs failed
    tok_s, tok_s_min, tok_s_max, ratio (to the first contender at the same memory), tok_s_last_half, prompt_tok_s,
    prompt_s, first_token_s, load_s, n_tokens, perplexity (when no run was cut short), user_ms, system_ms (CPU a token)
    mb_token (read for the experts of a token), disk_mb_token (what the system read for the process, page faults too),
    mb_wasted_token, needed_mb_token, prompt_mb_token, disk_written_mb
    hit_rate (there when asked for), late_rate (on the way), hit_rate_high, hit_rate_low (with those on the way),
    share_high, share_low, share_skipped, loads_high, loads_low (of the selections), mass_low, mass_skipped (of the
    router weights), recall, prefetches, prefetches_useful,
    prefetches_late, prefetches_wasted
    stall_share, stall_ms, expert_ms, prediction_ms, spent_ms (compute, stall, other), token_ms, bound_ms, bound_is,
    bound_share
    memory_budget, peak_rss, within_budget, peak_cgroup (page cache included), pool_bytes, slots_high, slots_low
    plan: tok_s, tok_s_low, tok_s_high, mb_token, peak, as hobbit plan says; error (of tok_s), error_mb, in_band
runs: every run as it was, with `round`
"""

Row = Dict[str, Any]


def build_rows(medians: Sequence[Row]) -> List[Row]:
    """Adds the ratios to the first contender in the same memory; there are none where that failed."""
    first = medians[0]["contender"] if medians else None
    base: Dict[Optional[int], float] = {
        row["memory"]: row["tok_s"] for row in medians if row["contender"] == first and "error" not in row
    }
    rows = []
    for row in medians:
        if "error" not in row and row["memory"] in base:
            row["ratio"] = row["tok_s"] / base[row["memory"]]
        rows.append(row)
    return rows


def _text(row: Row, key: str, form: str = "{:.1f}", scale: float = 1.0) -> str:
    value = row.get(key)
    return form.format(value * scale) if isinstance(value, (int, float)) else ""


def _memory_text(row: Row) -> str:
    return human(row["memory"]) if row.get("memory") else "all"


def _plan_text(row: Row) -> str:
    plan = row.get("plan")
    return "" if plan is None else f"{plan['tok_s']:.1f} ({plan['error']:+.0%})"


def _peak_text(row: Row) -> str:
    if "within_budget" not in row:  # no budget of its own: what the kernel counted, where it was capped
        peak = row.get("peak_cgroup") or row.get("peak_rss")
        return "" if peak is None else human(peak)
    peak = row["peak_rss"]
    return f"{human(peak)} {'ok' if row['within_budget'] else 'OVER'}"


def print_report(document: Dict[str, Any]) -> None:
    """To stdout, for people: conditions first, then two tables."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=180)
    for line in condition_lines(document):
        console.print(line, markup=False, soft_wrap=True)
    _print_speed(document["rows"], console)
    _print_time(document["rows"], console)
    for line in row_lines(document["rows"]):
        console.print(line, markup=False, soft_wrap=True)


def row_lines(rows: Sequence[Row]) -> List[str]:
    """What is to be known about rows beside their figures: that one failed, was not capped, went over its budget."""
    return [f"{_memory_text(row)}, {row['contender']}: {note}" for row in rows for note in _notes(row)]


def _notes(row: Row) -> List[str]:
    """What is to be known about a row, a line each."""
    notes = list(row.get("notes", ()))
    if "error" in row:
        notes.insert(0, f"failed: {row['error']}")
    elif row.get("capped") is False:
        notes.insert(0, "not capped" if row["cap"] == "no cap" else row["cap"])
    if row.get("within_budget") is False:
        notes.insert(0, f"went over its budget of {human(row['memory_budget'])}")
    return notes


def condition_lines(document: Dict[str, Any]) -> List[str]:
    """What the figures are worth depends on this."""
    model, c, disk, floor = (document[key] for key in ("model", "conditions", "disk", "floor"))
    v = document["versions"]
    lines = [
        f"{model['name']}: {model['layers']} layers of {model['experts']} experts, {model['used']} used; {human(model['bytes'])}",
        f"{c['cpu']}, {c['threads']} threads on {c['cores']} cores, {human(c['memory_total'])}; "
        f"load {c['load_average']:.1f} before",
        f"hobbit-cpp {v['hobbit_cpp']}, llama.cpp {v['llama_cpp'][:9]}, {v['kernel']}",
        f"{c['start']} start, {c['page_cache']}; text {c['text']}: {c['prompt_tokens']} tokens at once, then "
        f"{c['tokens']} one by one; "
        f"context {c['ctx']}; {c['rounds']} rounds, alternating, medians",
    ]
    if any(row["kind"] == "offload" and row["capped"] for row in document["rows"]):
        lines.append(
            "memory: of the cgroup; the engine is told 2 % less, at least 24 MiB, for what the kernel counts beside a process"
        )
    if c.get("routing"):
        n = c.get("routing_layers") or model["layers"]
        repeated = f" (its {n} layers over and over)" if n < model["layers"] else ""
        lines.append(f"routing replayed from {c['routing']}{repeated}; stock llama.cpp routes by its own")
    elif model["random_weights"]:
        lines.append("the weights are random: hit rate = cache share, and nothing can be predicted")
    if disk is not None:
        rates = ", ".join(f"{rate / 1e9:.2f} at {depth}" for depth, rate in disk["bandwidth"].items())
        ahead = "unknown" if c["read_ahead"] is None else f"{c['read_ahead']} KiB"
        lines.append(f"disk: GB/s in reads of {disk['read_bytes'] / 1024:.0f} KiB by queue depth: {rates}; read-ahead {ahead}")
    if floor is not None:
        lines.append(f"cores: {floor['ms']:.1f} ms a token with every expert in memory ({floor['source']})")
    return lines


def _table(title: str, heads: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in ("memory", "contender") else "right")
    return table


def _print_speed(rows: Sequence[Row], console: Any) -> None:
    heads = (
        "memory",
        "contender",
        "tokens/s",
        "min - max",
        "ratio",
        "prompt t/s",
        "first token s",
        "MB/token",
        "perplexity",
        "peak",
        "plan",
    )
    table = _table("speed", heads)
    for row in rows:
        name = row["contender"]
        if "error" in row:
            table.add_row(_memory_text(row), name, "failed")
            continue
        low_high = f"{row['tok_s_min']:.2f} - {row['tok_s_max']:.2f}"
        mb = _text(row, "mb_token") or _text(row, "disk_mb_token")
        table.add_row(
            _memory_text(row), name, f"{row['tok_s']:.2f}", low_high, _text(row, "ratio", "{:.2f}"),
            _text(row, "prompt_tok_s"),
            _text(row, "first_token_s", "{:.2f}"), mb, _text(row, "perplexity", "{:.2f}"), _peak_text(row), _plan_text(row),
        )  # fmt: skip
    console.print(table)


def _print_time(rows: Sequence[Row], console: Any) -> None:
    heads = (
        "memory", "contender", "hits", "late", "high/low/skipped", "stall", "ms: compute", "stall", "other", "prediction",
        "bound", "of bound",
    )  # fmt: skip
    table = _table("where the time went, and the roof", heads)
    n_shown = 0
    for row in rows:
        if "error" in row or ("bound_ms" not in row and "hit_rate" not in row):
            continue
        n_shown += 1
        mix = ""
        if "share_high" in row:
            mix = f"{row['share_high']:.2f}/{row['share_low']:.2f}/{row['share_skipped']:.2f}"
        spent = row.get("spent_ms") or {}
        bound = f"{row['bound_ms']:.1f} {row['bound_is']}" if "bound_ms" in row else ""
        table.add_row(
            _memory_text(row), row["contender"], _text(row, "hit_rate", "{:.0%}"), _text(row, "late_rate", "{:.0%}"), mix,
            _text(row, "stall_share", "{:.0%}"), _text(spent, "compute"),
            _text(spent, "stall"), _text(spent, "other"), _text(row, "prediction_ms"), bound, _text(row, "bound_share", "{:.0%}"),
        )  # fmt: skip
    if n_shown:
        console.print(table)
