"""Sections drawn over time: one token, memory. And the rows of bench and eval."""

from __future__ import annotations

import math
from collections import defaultdict
from html import escape
from typing import Any, Dict, List, Sequence, Tuple

from .._memory import human
from .sources import Data
from .svg import Plot, both, legend, number, plain, table, ticks

Span = Tuple[float, float]


class Token:
    """Events of a token, by layer; milliseconds."""

    def __init__(self, events: Sequence[Sequence[Any]]) -> None:
        self.total = max((1e3 * e[3] for e in events if e[0] == "decode"), default=0.0)
        self.by: Dict[int, Dict[str, List[Span]]] = defaultdict(lambda: defaultdict(list))
        self.bytes: Dict[str, int] = defaultdict(int)
        self.n: Dict[str, int] = defaultdict(int)
        for kind, block, begin, end, size in events:
            if kind == "decode":
                continue
            self.by[block][kind].append((1e3 * begin, min(1e3 * end, self.total) if self.total else 1e3 * end))
            self.bytes[kind] += size
            self.n[kind] += 1
        self.total = self.total or max((s[1] for k in self.by.values() for v in k.values() for s in v), default=0.0)
        self.blocks = sorted(self.by)
        before: float = 0.0
        for block in self.blocks:
            kinds = self.by[block]
            if kinds["route"]:
                kinds["dense"].append((before, kinds["route"][0][0]))
            before = max((s[1] for name in ("route", "experts") for s in kinds[name]), default=before)
        self.rest: Span = (before, self.total)

    def sum(self, kind: str, block: int) -> float:
        return sum(end - begin for begin, end in self.by[block][kind])

    def sums(self, kind: str) -> float:
        return sum(self.sum(kind, block) for block in self.blocks)


_KINDS = (
    ("dense", "c-dense", "attention, router"),
    ("experts", "c-compute", "experts, computing"),
    ("stall", "c-stall", "waiting for reads"),
    ("read", "c-read", "reads on demand"),
    ("prefetch", "c-prefetch", "reads ahead"),
)


def timeline(data: Data) -> str:
    """The last token, and the slowest."""
    out = []
    last, slowest = data.timeline.get("last"), data.timeline.get("slowest")
    tokens = [("The last token", last), ("The slowest token", slowest)]
    if last == slowest:
        tokens = [("The last token, also the slowest", last)]
    for title, events in tokens:
        if events:
            token = Token(events)
            out.append(f"<h3>{title}: {token.total:.1f} ms</h3>" + _token(token))
    return legend([(css, name) for _, css, name in _KINDS]) + "".join(out)


def _token(token: Token) -> str:
    n = len(token.blocks)

    def draw(width: int, css: str) -> str:
        row = max(9, min(16, 480 // max(n, 1)))
        p = Plot(width, row * (n + 1) + 52, (0, token.total), (0, n + 1), down=True)
        p.x_axis("time since the token began (ms)", ticks(0, token.total, 10 if width > 500 else 5))
        for y, block in enumerate(token.blocks):
            kinds = token.by[block]
            for begin, end in kinds["dense"]:
                p.rect(begin, y + 0.08, end, y + 0.62, "c-dense", f"layer {block}: {end - begin:.2f} ms attention, router")
            for begin, end in kinds["experts"]:
                p.rect(begin, y + 0.08, end, y + 0.62, "c-compute", f"layer {block}: {end - begin:.2f} ms in an expert product")
            for begin, end in kinds["stall"]:
                p.rect(begin, y + 0.08, end, y + 0.62, "c-stall", f"layer {block}: {end - begin:.2f} ms waiting")
            for kind, name in (("prefetch", "ahead"), ("read", "on demand")):
                spans = kinds[kind]
                if spans:
                    begin, end = min(s[0] for s in spans), max(s[1] for s in spans)
                    what = f"layer {block}: {len(spans)} slices read {name} in {end - begin:.2f} ms"
                    p.rect(begin, y + 0.68, max(end, begin + token.total / 2000), y + 0.96, f"c-{kind}", what)
        p.rect(token.rest[0], n + 0.08, token.rest[1], n + 0.62, "c-dense", f"output: {token.rest[1] - token.rest[0]:.2f} ms")
        step = -(-13 // row)
        labels = [(i + 0.5, str(token.blocks[i])) for i in range(0, n, step)]
        for middle, text in [*labels, (n + 0.5, "out")]:
            p.text(p.x0 - 8, p.py(middle) + 4, text, "end")
        p.text(13, (p.y0 + p.y1) / 2, "layer (N of blk.N)", css="label", turn=True)
        return p.svg(f"Time line of one token of {token.total:.1f} ms over {n} layers", css)

    experts, stall = token.sums("experts") - token.sums("stall"), token.sums("stall")
    outside = token.total - token.sums("experts")
    note = (
        f'<p class="note">{outside:.1f} ms outside of the experts (attention, routers, output), '
        f"{experts:.1f} ms computing experts, "
        f"{stall:.1f} ms waiting for reads; {token.n['read']} slices ({token.bytes['read'] / 1e6:.1f} MB) read on demand, "
        f"{token.n['prefetch']} ({token.bytes['prefetch'] / 1e6:.1f} MB) ahead. As compute thread 0 sees it.</p>"
    )
    rows = [
        [
            str(b),
            f"{token.sum('dense', b):.2f}",
            f"{token.sum('experts', b) - token.sum('stall', b):.2f}",
            f"{token.sum('stall', b):.2f}",
            str(len(token.by[b]["read"])),
            str(len(token.by[b]["prefetch"])),
        ]
        for b in token.blocks
    ]
    head = ["layer", "ms before the experts", "ms in experts", "ms waiting", "slices on demand", "slices ahead"]
    return both(draw) + note + table(head, rows, "Figures by layer")


def memory(data: Data) -> str:
    """What the process held, against its budget."""
    assert data.memory
    samples = [(t, b / (1 << 20)) for t, b in data.memory]
    begin, end = samples[0][0], max(samples[-1][0], samples[0][0] + 1e-3)
    budgets = [(t, b / (1 << 20)) for t, b in data.budgets]
    budget = max((b for _, b in budgets), default=0.0)
    peak = max(b for _, b in samples)
    top = 1.08 * max(peak, budget)
    steps: List[Tuple[float, float]] = []
    for t, b in budgets:
        t = min(max(t, begin), end)
        steps += [(t, steps[-1][1])] if steps else [(begin, b)]
        steps.append((t, b))
    steps += [(end, steps[-1][1])] if steps else []
    over = _above(samples, budgets)

    def draw(width: int, css: str) -> str:
        p = Plot(width, 240, (begin, end), (0, top), left=64)
        p.y_axis("memory held (MiB)", ticks(0, top, 5))
        p.x_axis("time since the recording began (s)", ticks(begin, end, 8 if width > 500 else 5))
        p.area(samples, [(t, 0.0) for t, _ in samples], "c-band")
        p.line(samples, "l-hit")
        if steps:
            p.line(steps, "mean")
            p.text(p.x1, p.py(steps[-1][1]) - 5, f"budget {steps[-1][1]:,.0f} MiB", "end", "halo")
        return p.svg(f"Curve: memory held over {end - begin:.1f} s, at most {peak:,.0f} MiB", css)

    note = f"At most {peak:,.0f} MiB in {len(samples)} samples"
    note += f", {over or 'none'} of them above the budget." if steps else "."
    return both(draw) + f'<p class="note">{note}</p>'


def _above(samples: Sequence[Tuple[float, float]], budgets: Sequence[Tuple[float, float]]) -> int:
    """Samples above the budget of their time."""
    n, i = 0, 0
    for t, held in samples:
        while i + 1 < len(budgets) and budgets[i + 1][0] <= t:
            i += 1
        n += bool(budgets) and held > budgets[i][1]
    return n


def _conditions(lines: Sequence[str]) -> str:
    """What the figures above depend on."""
    return f'<ul class="note">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _describe(row: Dict[str, Any]) -> str:
    memory = row.get("memory")
    return f"{row['contender']}, {human(memory)}" if isinstance(memory, (int, float)) else str(row["contender"])


def contenders(data: Data) -> str:
    """Speed of the rows of `hobbit bench`."""
    rows = data.contenders or []
    if not rows:
        return _conditions(data.contender_conditions)
    best = max(float(r["tok_s"]) for r in rows) or 1.0

    def draw(width: int, css: str) -> str:
        p = Plot(width, 40 * len(rows) + 56, (0, 1.12 * best), (0, len(rows)), left=12, down=True)
        p.x_axis("tokens a second", ticks(0, best, 8 if width > 500 else 4))
        for i, r in enumerate(rows):
            rate = float(r["tok_s"])
            p.rect(0, i + 0.45, rate, i + 0.9, "c-hit", f"{_describe(r)}: {rate:.2f} tokens a second")
            p.text(p.x0, p.py(i + 0.36), _describe(r), "start", "halo")
            p.text(p.px(rate) + 5, p.py(i + 0.68) + 4, f"{rate:.1f}", "start")
        return p.svg("Bars: tokens a second of each contender", css)

    keys = (
        ("mb_token", "MB a token"),
        ("hit_rate", "hit rate"),
        ("stall_share", "share waited"),
        ("bound_share", "of the bound"),
    )
    body = [
        [_describe(r), f"{r['tok_s']:.2f}", *(f"{r[k]:.3g}" if isinstance(r.get(k), (int, float)) else "-" for k, _ in keys)]
        for r in rows
    ]
    figures = table(["contender", "tokens/s", *(name for _, name in keys)], body, "Figures")
    return both(draw) + figures + _conditions(data.contender_conditions)


def settings(data: Data) -> str:
    """Quality against traffic of the rows of `hobbit eval`."""
    rows = [s for s in data.settings or [] if s.get("offload") and (s.get("text") or {}).get("kl")]
    return (_losses(rows) if rows else "") + _setting_table(data.settings or []) + _conditions(data.setting_conditions)


_SETTING_COLUMNS = (
    ("MB a token", "offload", "mb_per_token", 1.0),
    ("perplexity", "text", "perplexity", 1.0),
    ("KL, mnat", "text", "kl", 1e3),
    ("top-1 agrees, %", "text", "top1_agreement", 1e2),
    ("acc, %", "questions", "acc", 1e2),
    ("acc_norm, %", "questions", "acc_norm", 1e2),
)


def _setting_table(settings: Sequence[Dict[str, Any]]) -> str:
    """All figures; those with an interval show it."""

    def cell(setting: Dict[str, Any], part: str, key: str, scale: float) -> str:
        value = (setting.get(part) or {}).get(key)
        if not isinstance(value, dict):
            return f"{scale * value:.1f}" if isinstance(value, (int, float)) else ""
        if value["value"] is None:
            return ""
        text = f"{scale * value['value']:.2f}"
        return text + (f" [{scale * value['low']:.2f}, {scale * value['high']:.2f}]" if value["low"] is not None else "")

    columns = [[cell(s, *column[1:]) for s in settings] for column in _SETTING_COLUMNS]
    shown = [(column[0], cells) for column, cells in zip(_SETTING_COLUMNS, columns) if any(cells)]
    body = [[str(s["name"]), *(cells[i] or "-" for _, cells in shown)] for i, s in enumerate(settings)]
    return table(["setting", *(name for name, _ in shown)], body, "Figures")


def _losses(rows: Sequence[Dict[str, Any]]) -> str:
    """A point for each setting."""
    kls = [1e3 * x for s in rows for x in s["text"]["kl"].values() if x and x > 0]
    low = 10.0 ** math.floor(math.log10(max(min(kls, default=1.0), 1e-3)))
    high = 10.0 ** math.ceil(math.log10(max([*kls, 2 * low])))
    decades = [low * 10**i for i in range(round(math.log10(high / low)) + 1)]

    def place(x: float) -> float:
        return math.log10(min(max(x, low), high))

    def draw(width: int, css: str) -> str:
        p = Plot(width, 40 * len(rows) + 56, (math.log10(low), math.log10(high)), (0, len(rows)), left=20, down=True)
        p.x_axis(
            "KL from exact mode (mnat a token, logarithmic)", [math.log10(d) for d in decades], lambda x: plain(round(10**x, 6))
        )
        for i, s in enumerate(rows):
            kl, y = s["text"]["kl"], p.py(i + 0.68)
            p.text(p.x0, p.py(i + 0.36), f"{s['name']}: {s['offload']['mb_per_token']:.1f} MB a token", "start", "halo")
            if not kl["value"] > 0:
                p.text(p.x0, y + 4, "no loss", "start")
                continue
            x = number(p.px(place(1e3 * kl["value"])))
            if kl["low"] is not None:
                ends = [number(p.px(place(1e3 * kl[end]))) for end in ("low", "high")]
                p.add(f'<path class="whisker" d="M{ends[0]} {number(y)}H{ends[1]}"/>')
            p.add(f'<circle class="c-hit" cx="{x}" cy="{number(y)}" r="5"/>')
        return p.svg("Points: quality lost by each setting, with the MB it reads a token", css)

    return both(draw) + '<p class="note">Farther left is better, at as few MB. Lines: 95 % intervals.</p>'
