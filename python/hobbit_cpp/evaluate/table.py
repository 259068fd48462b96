"""The table of `hobbit eval`, and the conditions under it."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

from .._memory import human

Format = Callable[[float], str]


def show(result: Dict[str, Any], console: Any) -> None:
    """Prints the result of `run` (as plain data) on a rich console."""
    from rich.table import Table

    settings = result["settings"]
    if not settings:
        console.print("interrupted before anything was finished")
        return
    table = Table(title="in brackets: 95 % intervals", title_justify="left")
    table.add_column("", no_wrap=True)
    for setting in settings:
        table.add_column(_name(setting), justify="right")
    for name, cell, comparing in _LINES:
        cells = [cell(setting) for setting in settings]
        if any(cells) and (len(settings) > 1 or not comparing):
            table.add_row(name, *[c or "-" for c in cells])
    console.print(table)
    for line in notes(result):
        console.print(line, highlight=False, markup=False)


def _name(row: Dict[str, Any]) -> str:
    value = (row["tuning"] or {}).get("value")
    return f"{row['name']}\n(found: {value:.3g})" if value is not None else str(row["name"])


def _get(part: str, key: str, form: Format, interval: bool = True) -> Callable[[Dict[str, Any]], Optional[str]]:
    def cell(row: Dict[str, Any]) -> Optional[str]:
        figures = row.get(part)
        value = figures.get(key) if figures else None
        if value is None:
            return None
        if isinstance(value, dict):
            if value["value"] is None:
                return None
            text = form(value["value"])
            if interval and value["low"] is not None:
                text += f"\n[{form(value['low'])}, {form(value['high'])}]"
            return text.replace("[", "\\[")
        return form(value)

    return cell


def _saved(row: Dict[str, Any]) -> Optional[str]:
    saved = row["mb_saved_per_token"]
    if saved is None:
        return None
    whole = saved + row["offload"]["mb_per_token"]
    return f"{saved:.1f}" + (f"\n{saved / whole:.0%}" if whole > 0 else "")


def _mix(row: Dict[str, Any]) -> Optional[str]:
    o = row["offload"]
    return f"{o['high']:.2f}/{o['low']:.2f}/{o['skipped']:.2f}" if o else None


def _number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _change(x: float) -> str:
    return f"{100 * x:+.2f}"


_LINES: List[Tuple[str, Callable[[Dict[str, Any]], Optional[str]], bool]] = [
    ("MB read a token", _get("offload", "mb_per_token", lambda x: f"{x:.1f}"), False),
    ("MB saved a token", _saved, True),
    ("high/low/skipped", _mix, False),
    ("perplexity", _get("text", "perplexity", lambda x: f"{x:.2f}"), False),
    ("change of it, %", _get("text", "perplexity_change", _change), True),
    ("KL, mnat", _get("text", "kl", lambda x: _number(1000 * x)), True),
    ("KL, 95th %, mnat", _get("text", "kl_95", lambda x: _number(1000 * x)), True),
    ("top-1 agrees, %", _get("text", "top1_agreement", _percent), True),
    ("acc, %", _get("questions", "acc", _percent), False),
    ("change of it", _get("questions", "acc_change", _change), True),
    ("acc_norm, %", _get("questions", "acc_norm", _percent), False),
    ("change of it", _get("questions", "acc_norm_change", _change), True),
    ("lost a MB saved:", lambda row: " " if row["lost_per_mb_saved"] else None, True),
    ("  KL, mnat", _get("lost_per_mb_saved", "kl", lambda x: _number(1000 * x)), True),
    ("  perplexity, %", _get("lost_per_mb_saved", "perplexity_percent", lambda x: f"{x:+.3f}"), True),
]


def notes(result: Dict[str, Any]) -> List[str]:
    """How it was measured, in sentences."""
    c = result["conditions"]
    width = c["tokens_per_decode"]
    lines = []
    if width == 1:
        how = "one token per decode, as text is generated"
    else:
        how = f"{width} tokens per decode"
        if c["model"] is not None:
            how += " (no rule here depends on the cache); MB are those of batches"
    if c["tokens_scored"]:
        lines.append(
            f"{c['tokens_scored']} tokens of {c['text']} scored, in windows of {c['window']} ({c['windows']} of them)"
            + (f", the first {c['skip']} of each not scored" if c["skip"] else "")
            + f"; {how}"
        )
    elif c["questions"]:
        lines.append(how)
    if c["questions"]:
        lines.append(
            f"{c['questions']} questions by log-likelihood: acc by its sum, acc_norm by its mean a character; Wilson's intervals"
        )
    if c["model"] is not None:
        lines.append(
            f"every setting: the model loaded anew, expert pool {human(c['expert_pool'])} "
            f"({_share(c)} of all experts), {c['warmup_tokens']} tokens to warm up, "
            f"{'direct reads' if c['model']['direct_io'] else 'reads through the page cache'}"
        )
    if c["tokens_scored"]:
        lines.append(
            "intervals of text: bootstrap over blocks of neighbouring tokens; change of perplexity and KL are against exact "
            "mode, token by token: these tell settings apart, the perplexities do not"
            if len(result["settings"]) > 1
            else "interval: bootstrap over blocks of neighbouring tokens"
        )
    for row in result["settings"]:
        tuning = row["tuning"]
        if tuning is not None:
            lines.append(
                f"{row['name']}: {tuning['value']:.3g} found in {len(tuning['tried'])} tries, "
                f"{tuning['reached_mb_per_token']:.1f} MB a token on the tuning text where "
                f"{tuning['target_mb_per_token']:.1f} were wanted"
            )
    if result["interrupted"]:
        lines.append("interrupted: only what was finished is shown")
    return lines


def _share(c: Dict[str, Any]) -> str:
    whole = c["model"]["bytes_high"]
    return f"{min(1.0, c['expert_pool'] / whole):.0%}" if whole else "?"
