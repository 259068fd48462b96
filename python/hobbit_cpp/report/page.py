"""The page: sections, style and a little script in one file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional

from . import layers, over_time
from .sources import Data


class Section(NamedTuple):
    """A heading, what it shows in a sentence, how it is drawn (None: the input does not have it), and what would have it."""

    id: str
    title: str
    lead: str
    draw: Optional[Callable[[Data], str]]
    missing: str = ""


_RUN = "hobbit run --json-stats FILE"
_RECORD = "hobbit run --record --json-stats FILE"


def sections(data: Data) -> List[Section]:
    """In the order of the page. Those of bench and eval only where there is such a file."""
    has_counts = data.layers is not None and data.counts is not None
    out = [
        Section(
            "experts", "Experts by layer", "How often each expert was selected. Uneven rows cache well.",
            layers.heat_map if data.uses is not None else None, f"{_RUN} and hobbit trace record the selections of each expert",
        ),
        Section(
            "hits", "Hit rate by layer", "Selections whose expert was in memory, or on its way, when its layer asked.",
            layers.hit_rate if has_counts else None, f"{_RUN} counts hits (a trace is routing alone, without a cache)",
        ),
        Section(
            "reuse", "Reuse distances", "How large a cache would have to be: what an LRU cache of each size would have served.",
            layers.reuse if data.reuse is not None else None, f"{_RECORD} and hobbit trace record the order of selections",
        ),
        Section(
            "precision", "Precision mix", "How selections were served. Low precision and skips are the loss of HOBBIT's mode.",
            layers.precision_mix if has_counts else None, f"{_RUN} counts precisions",
        ),
        Section(
            "timeline", "Time line of a token", "From layer to layer: what was computed, waited for and read.",
            over_time.timeline if any(data.timeline.values()) else None, f"{_RECORD} records one",
        ),
        Section(
            "memory", "Memory over time", "All that the process held, the expert pool included.",
            over_time.memory if data.memory else None, f"{_RECORD} samples memory",
        ),
    ]  # fmt: skip
    if data.contenders or data.contender_conditions:
        out.append(Section("contenders", "Contenders", "Speed of each contender of the benchmark.", over_time.contenders))
    if data.settings:
        out.append(Section("settings", "Quality and traffic", "What each setting loses for what it saves.", over_time.settings))
    return sorted(out, key=lambda s: s.draw is None)  # what is missing comes last


def page(data: Data) -> str:
    """HTML, with everything in it."""
    found = sections(data)
    body = "".join(_section(s, data) for s in found)
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in found if s.draw is not None)
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in data.facts)
    title = escape(data.name)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} - hobbit report</title><style>{_beside('page.css')}</style></head>\n<body>"
        f"<header><h1>{title}</h1><p>hobbit report of {escape(', '.join(data.inputs))}</p>"
        f"<dl>{facts}</dl><nav>{links}</nav></header>\n<main>{body}</main>"
        f"<script>{_beside('page.js')}</script></body></html>\n"
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _section(s: Section, data: Data) -> str:
    if s.draw is None:
        content = f'<p class="missing">Not in the input: {escape(s.missing)}.</p>'
    else:
        content = f"<p>{escape(s.lead)}</p>{s.draw(data)}"
    return f'<section id="{s.id}"><h2>{escape(s.title)}</h2>{content}</section>\n'
