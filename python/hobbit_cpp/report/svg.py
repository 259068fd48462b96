"""A few words of SVG: a plot area with axes that have labels and units. Colours are CSS classes, for light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import Callable, List, Sequence, Tuple

# What a chart is drawn at: on a desktop, and on a phone. The letters stay as large.
WIDE, NARROW = 920, 344

Point = Tuple[float, float]


def ticks(low: float, high: float, n: int) -> List[float]:
    """About `n` round numbers from `low` to `high`."""
    span = high - low
    if not span > 0 or n < 1:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / n))
    step = next(step * f for f in (1, 2, 2.5, 5, 10) if span / (step * f) <= n)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(x: float) -> str:
    """A coordinate, in few characters."""
    return f"{x:.1f}".rstrip("0").rstrip(".")


def plain(x: float) -> str:
    """A tick."""
    return f"{x:,.10g}"


class Plot:
    """A chart of `width` with a plot area in it; methods append elements in data coordinates.

    Args:
        x, y: ranges of the data. For rows of a heat map or bars, y grows downwards: y = (n, 0) reversed by `down`.
    """

    def __init__(
        self, width: int, height: int, x: Point, y: Point, *, left: int = 52, bottom: int = 42, top: int = 10, down: bool = False
    ) -> None:
        self.width, self.height = width, height
        self.x0, self.x1, self.y0, self.y1 = left, width - 20, top, height - bottom
        self.x_range, self.y_range, self.down = x, y, down
        self.parts: List[str] = []

    def px(self, x: float) -> float:
        low, high = self.x_range
        return self.x0 + (x - low) / ((high - low) or 1) * (self.x1 - self.x0)

    def py(self, y: float) -> float:
        low, high = self.y_range
        share = (y - low) / ((high - low) or 1)
        return self.y0 + share * (self.y1 - self.y0) if self.down else self.y1 - share * (self.y1 - self.y0)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", css: str = "", turn: bool = False) -> None:
        """At a place of the picture, in pixels."""
        turned = f' transform="rotate(-90 {number(x)} {number(y)})"' if turn else ""
        css = f' class="{css}"' if css else ""
        self.add(f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{css}{turned}>{escape(text)}</text>')

    def x_axis(self, label: str, at: Sequence[float], form: Callable[[float], str] = plain) -> None:
        for x in at:
            px = self.px(x)
            self.add(f'<path class="grid" d="M{number(px)} {self.y0}V{self.y1 + 4}"/>')
            self.text(px, self.y1 + 17, form(x))
        self.text((self.x0 + self.x1) / 2, self.y1 + 35, label, css="label")

    def y_axis(self, label: str, at: Sequence[float], form: Callable[[float], str] = plain, grid: bool = True) -> None:
        for y in at:
            py = self.py(y)
            if grid:
                self.add(f'<path class="grid" d="M{self.x0 - 4} {number(py)}H{self.x1}"/>')
            self.text(self.x0 - 8, py + 4, form(y), "end")
        self.text(13, (self.y0 + self.y1) / 2, label, css="label", turn=True)

    def rect(self, x: float, y: float, x2: float, y2: float, css: str, title: str = "") -> None:
        """Between two corners, in data coordinates."""
        left, right = sorted((self.px(x), self.px(x2)))
        top, bottom = sorted((self.py(y), self.py(y2)))
        if right - left < 0.05 or bottom - top < 0.05:
            return
        size = f'x="{number(left)}" y="{number(top)}" width="{right - left:.2f}" height="{bottom - top:.2f}"'
        self.add(f'<rect class="{css}" {size}>{f"<title>{escape(title)}</title>" if title else ""}</rect>' if title
                 else f'<rect class="{css}" {size}/>')  # fmt: skip

    def line(self, points: Sequence[Point], css: str) -> None:
        path = "".join(f"{'L' if i else 'M'}{number(self.px(x))} {number(self.py(y))}" for i, (x, y) in enumerate(points))
        self.add(f'<path class="line {css}" d="{path}"/>')

    def area(self, upper: Sequence[Point], lower: Sequence[Point], css: str) -> None:
        points = [*upper, *reversed(lower)]
        path = "".join(f"{'L' if i else 'M'}{number(self.px(x))} {number(self.py(y))}" for i, (x, y) in enumerate(points))
        self.add(f'<path class="area {css}" d="{path}Z"/>')

    def svg(self, label: str, css: str = "", data: str = "") -> str:
        """The element; `label` says in words what is seen."""
        return (
            f'<svg class="{css}" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{escape(label)}"{data}>{"".join(self.parts)}</svg>'
        )


def both(draw: Callable[[int, str], str]) -> str:
    """The chart at two widths; the page shows the one that fits."""
    return f'<div class="chart">{draw(WIDE, "wide")}{draw(NARROW, "narrow")}</div>'


def legend(entries: Sequence[Tuple[str, str]]) -> str:
    """Class and text of each."""
    box = '<svg width="14" height="14" aria-hidden="true"><rect class="{}" width="14" height="14"/></svg>'
    items = "".join(f"<li>{box.format(css)}{escape(text)}</li>" for css, text in entries)
    return f'<ul class="legend">{items}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Figures behind a chart, folded away."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<details><summary>{escape(caption)}</summary><div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )
