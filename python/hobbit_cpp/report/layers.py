"""Sections drawn by layer: heat map of experts, hit rate, precision mix, reuse."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Sequence, Tuple

from .sources import Data
from .svg import Plot, both, legend, number, table, ticks

# Upper ends of the steps of the heat map, in means of the layer.
_STEPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
_STEP_NAMES = ("0", "to ¼", "to ½", "to 1", "to 1½", "to 2", "to 3", "to 5", "over 5")

_MIX: Tuple[Tuple[str, str, str], ...] = (
    ("hits_high", "c-hit", "high, from the cache"),
    ("loads_high", "c-read", "high, read"),
    ("hits_low", "c-low", "low, from the cache"),
    ("loads_low", "c-lowread", "low, read"),
    ("skips", "c-skip", "skipped"),
)


def _row_ticks(blocks: Sequence[int], most: int) -> List[int]:
    """Rows that get a label: at most so many, evenly apart."""
    step = 1
    while len(blocks) / step > most:
        step = step * 2 if step in (1, 5, 10, 50) else step * 5 // 2
    return [i for i in range(len(blocks)) if blocks[i] % step == 0] or [0]


def heat_map(data: Data) -> str:
    """How often each expert was selected, in means of its layer."""
    assert data.uses is not None and data.blocks is not None
    uses, blocks = data.uses, data.blocks
    n = max(map(len, uses))
    sums = [sum(row) for row in uses]
    levels = [[_level(u * len(row) / s if s else 0.0) for u in row] for row, s in zip(uses, sums)]

    def draw(width: int, css: str) -> str:
        row = max(5, min(14, 460 // len(uses)))
        p = Plot(width, row * len(uses) + 52, (0, n), (0, len(uses)), down=True)
        wide = (p.x1 - p.x0) / n
        paths: Dict[int, List[str]] = {}
        for y, line in enumerate(levels):
            x = 0
            while x < len(line):
                end = x + 1
                while end < len(line) and line[end] == line[x]:
                    end += 1
                left = p.x0 + x * wide
                paths.setdefault(line[x], []).append(
                    f"M{number(left)} {p.y0 + y * row}h{number((end - x) * wide)}v{row}H{number(left)}z"
                )
                x = end
        for level, path in sorted(paths.items()):
            p.add(f'<path class="h{level}" d="{"".join(path)}"/>')
        for i in _row_ticks(blocks, (p.y1 - p.y0) // 16):
            p.text(p.x0 - 8, p.py(i + 0.5) + 4, str(blocks[i]), "end")
        p.text(13, (p.y0 + p.y1) / 2, "layer (N of blk.N)", css="label", turn=True)
        p.x_axis("expert", [t for t in ticks(0, n, 12 if width > 500 else 6) if t < n])
        box = f' data-x="{p.x0},{p.x1}" data-y="{p.y0},{p.y1}"'
        return p.svg(f"Heat map: {len(uses)} layers of {n} experts, shaded by how often each was selected", f"{css} heat", box)

    used = [sum(1 for u in row if u) for row in uses]
    rows = []
    for block, line, s, n_used in zip(blocks, uses, sums, used):
        best = sorted(range(len(line)), key=lambda e: -line[e])[:4]
        top = ", ".join(f"{e} ({line[e] / s:.1%})" for e in best if s and line[e])
        rows.append([str(block), f"{s:,}", f"{n_used} of {len(line)}", top])
    embedded = json.dumps({"blocks": blocks, "uses": uses, "loads": data.loads}, separators=(",", ":"))
    return (
        both(draw)
        + '<p class="hover" role="status" aria-live="polite">Point at a cell to see its figures.</p>'
        + legend([(f"h{i}", name) for i, name in enumerate(_STEP_NAMES)])
        + '<p class="note">Selections of an expert, as a multiple of the mean of its layer: 1 is even use.</p>'
        + table(["layer", "selections", "experts used", "most used (share of the layer)"], rows, "Figures by layer")
        + f'<script type="application/json" id="heat-data">{embedded.replace("<", chr(92) + "u003c")}</script>'
    )


def _level(ratio: float) -> int:
    return next((i for i, end in enumerate(_STEPS) if ratio <= end), len(_STEPS))


def _share(layer: Dict[str, Any], *names: str) -> float:
    n = layer["selections"]
    return sum(float(layer[name]) for name in names) / n if n else 0.0


def hit_rate(data: Data) -> str:
    """Share of the selections of each layer that were there before they were asked for."""
    assert data.layers is not None and data.counts is not None
    layers = data.layers
    mean = _share(data.counts, "hits_high", "hits_low")

    def draw(width: int, css: str) -> str:
        p = Plot(width, 250, (0, len(layers)), (0, 100))
        p.y_axis("hit rate (%)", [0, 25, 50, 75, 100])
        for i, layer in enumerate(layers):
            high, low = 100 * _share(layer, "hits_high"), 100 * _share(layer, "hits_low")
            name = f"layer {layer['block']:.0f}: {high + low:.1f} % hits, {low:.1f} % in low precision"
            p.rect(i + 0.1, 0, i + 0.9, high, "c-hit", name)
            p.rect(i + 0.1, high, i + 0.9, high + low, "c-low", name)
        p.add(f'<path class="mean" d="M{p.x0} {number(p.py(100 * mean))}H{p.x1}"/>')
        _block_axis(p, layers)
        return p.svg(f"Bars: hit rate by layer, {mean:.0%} over all layers", css)

    note = f'<p class="note">Dashed: {mean:.1%} over all layers.</p>'
    return both(draw) + legend([("c-hit", "high precision"), ("c-low", "low precision")]) + note + _layer_table(layers)


def precision_mix(data: Data) -> str:
    """What became of the selections of each layer."""
    assert data.layers is not None and data.counts is not None
    layers, counts = data.layers, data.counts

    def draw(width: int, css: str) -> str:
        p = Plot(width, 250, (0, len(layers)), (0, 100))
        p.y_axis("share of selections (%)", [0, 25, 50, 75, 100])
        for i, layer in enumerate(layers):
            low = 0.0
            for key, kind, name in _MIX:
                share = 100 * _share(layer, key)
                p.rect(i + 0.1, low, i + 0.9, low + share, kind, f"layer {layer['block']:.0f}: {share:.1f} % {name}")
                low += share
        _block_axis(p, layers)
        return p.svg("Stacked bars: how the selections of each layer were served", css)

    entries = [(css, f"{name} ({_share(counts, key):.1%})") for key, css, name in _MIX]
    mass = counts.get("mass_total") or 0.0
    note = ""
    if mass:
        low, skipped = counts["mass_low"] / mass, counts["mass_skipped"] / mass
        note = f'<p class="note">By router weight: {low:.1%} served in low precision, {skipped:.1%} skipped.</p>'
    return both(draw) + legend(entries) + note


def _block_axis(p: Plot, layers: Sequence[Dict[str, Any]]) -> None:
    blocks = [int(layer["block"]) for layer in layers]
    for i in _row_ticks(blocks, (p.x1 - p.x0) // 30):
        p.text(p.px(i + 0.5), p.y1 + 17, str(blocks[i]))
    p.text((p.x0 + p.x1) / 2, p.y1 + 35, "layer (N of blk.N)", css="label")


def _layer_table(layers: Sequence[Dict[str, Any]]) -> str:
    rows = []
    for layer in layers:
        shares = [f"{100 * _share(layer, key):.1f}" for key, _, _ in _MIX]
        bytes_read = (layer["bytes_demand"] + layer["bytes_prefetch"]) / 1e6
        rows.append(
            [str(layer["block"]), f"{layer['selections']:,}", *shares, f"{bytes_read:.1f}", f"{layer['stall_seconds']:.3f}"]
        )
    head = ["layer", "selections", *(f"{name}, %" for _, _, name in _MIX), "MB read", "s waited"]
    return table(head, rows, "Figures by layer")


def reuse(data: Data) -> str:
    """Share of the selections that a per-layer LRU cache of a size would hold."""
    assert data.reuse is not None
    served: List[List[float]] = []
    for row in data.reuse:
        total, seen, line = sum(row), 0, []
        for count in row[:-1]:
            seen += count
            line.append(100 * seen / total if total else 0.0)
        served.append(line)
    n = len(served[0])
    # the curve of c experts: what is reused at a distance below c
    columns = [sorted(line[c] for line in served) for c in range(n)]
    total = sum(map(sum, data.reuse)) or 1  # of a trace whose weights are all zero nothing was selected
    mean = [100 * sum(sum(row[: c + 1]) for row in data.reuse) / total for c in range(n)]
    first = sum(row[-1] for row in data.reuse) / total
    xs = [c + 1 for c in range(n)]

    def draw(width: int, css: str) -> str:
        p = Plot(width, 280, (0, n), (0, 100))
        p.y_axis("selections served (%)", [0, 25, 50, 75, 100])
        p.x_axis(f"experts of each layer in the cache, of {n}", ticks(0, n, 8 if width > 500 else 5))
        p.area([(x, c[-1]) for x, c in zip(xs, columns)], [(x, c[0]) for x, c in zip(xs, columns)], "c-band")
        p.line([(0, 0), *zip(xs, mean)], "l-hit")
        return p.svg("Curve: share of selections that a per-layer LRU cache of a given size would serve", css)

    marks = sorted({max(1, round(n * share)) for share in (0.125, 0.25, 0.5, 0.75)} | {n})
    rows = [[f"{c} ({c / n:.0%})", f"{mean[c - 1]:.1f}", f"{columns[c - 1][0]:.1f}", f"{columns[c - 1][-1]:.1f}"] for c in marks]
    which = "prompt included" if data.counts else "of the trace"
    note = (
        "Distance of a selection: how many other experts of its layer were used since it was used last. Over "
        f"{data.reuse_tokens:,} tokens ({which}); {first:.1%} of the selections were the first of their expert, which no cache "
        "serves."
    )
    return (
        both(draw)
        + legend([("c-hit", "all layers"), ("c-band", "from the worst layer to the best")])
        + f'<p class="note">{note}</p>'
        + table(["experts a layer", "served, %", "worst layer, %", "best layer, %"], rows, "Figures by cache size")
    )
