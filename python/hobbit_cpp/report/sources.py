"""What a report is made of, from the files that hobbit writes. What a file does not have stays None."""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .._recording import reuse_distances
from ..bench.report import condition_lines, row_lines
from ..errors import ParameterError
from ..evaluate.table import notes as eval_notes

Matrix = List[List[int]]

# Of the counts of a layer, and of all: what is drawn.
_COUNTS = (
    "selections", "hits_high", "hits_low", "loads_high", "loads_low", "skips", "mass_total", "mass_low", "mass_skipped",
    "bytes_demand", "bytes_prefetch", "stall_seconds",
)  # fmt: skip


@dataclass
class Data:
    """Everything that sections draw from.

    Attributes:
        name: of the model, for the title; inputs: the files.
        facts: label and text, for the head of the page.
        layers: counts of each MoE layer, as in `LayerCounts`.
        counts: the same over all layers, and what `OffloadStats` has beside.
        blocks: N of blk.N of the rows of `uses`, `loads` (selections and reads of each expert).
        reuse: counts by distance, [layer][n_experts + 1]; see `reuse_distances`.
        timeline: events of the last and of the slowest token.
        memory: seconds and bytes held; budgets: seconds and the budget from then on, in bytes.
        contenders: rows of `hobbit bench`; settings: of `hobbit eval`; conditions of each: what their figures are worth
            depends on, a line each.
    """

    name: str = ""
    inputs: List[str] = field(default_factory=list)
    facts: List[Tuple[str, str]] = field(default_factory=list)
    layers: Optional[List[Dict[str, Any]]] = None
    counts: Optional[Dict[str, Any]] = None
    blocks: Optional[List[int]] = None
    uses: Optional[Matrix] = None
    loads: Optional[Matrix] = None
    reuse: Optional[Matrix] = None
    reuse_tokens: int = 0
    timeline: Dict[str, List[List[Any]]] = field(default_factory=dict)
    memory: Optional[List[Tuple[float, float]]] = None
    budgets: List[Tuple[float, float]] = field(default_factory=list)
    contenders: Optional[List[Dict[str, Any]]] = None
    contender_conditions: List[str] = field(default_factory=list)
    settings: Optional[List[Dict[str, Any]]] = None
    setting_conditions: List[str] = field(default_factory=list)


def read(paths: Sequence[Path]) -> Data:
    """Puts the files together; where two have the same, the first counts.

    Raises:
        ParameterError: a file is none that hobbit writes.
    """
    data = Data()
    for path in paths:
        data.inputs.append(path.name)
        if zipfile.is_zipfile(path):
            _add_trace(data, path)
            continue
        if path.suffix.lower() == ".csv":
            _add_samples(data, path)
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            document = None
        try:
            known = isinstance(document, dict) and _add_document(data, document)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise ParameterError(f"{path} is damaged: {type(e).__name__}: {e}") from e
        if not known:
            raise ParameterError(
                f"{path} is not a file that can be drawn: give what hobbit run --json-stats, hobbit trace, "
                "hobbit bench --json or hobbit eval --json wrote"
            )
    data.name = data.name or ", ".join(data.inputs)
    return data


def _add_document(data: Data, document: Dict[str, Any]) -> bool:
    if "decode" in document and "prompt" in document:
        _add_run(data, document)
    elif isinstance(document.get("settings"), list) and "conditions" in document:
        _name(data, document.get("model"))
        if data.settings is None:
            data.settings = list(document["settings"])
            data.setting_conditions = eval_notes(document) if document["conditions"] else []
    elif isinstance(document.get("rows"), list) and any("contender" in row for row in document["rows"]):
        _name(data, document.get("model"))
        if data.contenders is None:
            data.contenders = [row for row in document["rows"] if "error" not in row]
            about = condition_lines(document) if document.get("conditions") else []
            data.contender_conditions = about + row_lines(document["rows"])
    else:
        return False
    return True


def _matrix(rows: Any) -> Matrix:
    return [[int(n) for n in row] for row in rows]


def _events(rows: Any) -> List[List[Any]]:
    return [[str(kind), int(block), float(begin), float(end), int(size)] for kind, block, begin, end, size in rows]


def _name(data: Data, model: Any) -> None:
    if isinstance(model, dict):
        model = model.get("name") or model.get("path")
    if model and not data.name:
        data.name = Path(str(model)).name


def _add_run(data: Data, document: Dict[str, Any]) -> None:
    _name(data, document.get("model"))
    answer, prompt = document["decode"], document["prompt"]
    for label, phase in (("prompt", prompt), ("answer", answer)):
        if phase["tokens"]:
            data.facts.append((label, f"{phase['tokens']} tokens, {phase['tokens_per_second']:.1f} a second"))
    stats = (answer if answer["tokens"] else prompt).get("offload")
    if stats:
        data.facts.append(("hit rate", f"{stats['hit_rate']:.1%}"))
        data.facts.append(("read a token", f"{stats['bytes_per_token'] / 1e6:.1f} MB"))
        data.counts = data.counts or {key: float(stats[key]) for key in _COUNTS}
        data.layers = data.layers or [{k: float(layer[k]) for k in ("block", *_COUNTS)} for layer in stats.get("layers") or []]
        data.layers = data.layers or None
        budget = float(stats.get("memory_budget") or 0)
        if budget:
            data.budgets = data.budgets or [(0.0, budget)]
            data.facts.append(("budget", f"{budget / (1 << 30):.2f} GiB"))
    data.facts.append(("peak memory", f"{document['peak_memory'] / (1 << 30):.2f} GiB"))
    experts = document.get("experts")
    if experts and data.uses is None and any(map(any, experts["uses"])):
        data.blocks = [int(b) for b in experts["blocks"]]
        data.uses, data.loads = _matrix(experts["uses"]), _matrix(experts["loads"])
        if not len(data.blocks) == len(data.uses) == len(data.loads):
            raise ValueError("experts of different layers")
    recording = document.get("recording")
    if recording:
        data.timeline = data.timeline or {k: _events(v) for k, v in recording["timeline"].items() if v}
        if data.memory is None and recording["memory"]:
            data.memory = [(float(t), float(b)) for t, b in recording["memory"]]
        if data.reuse is None and recording["reuse"]["counts"]:
            data.reuse, data.reuse_tokens = _matrix(recording["reuse"]["counts"]), int(recording["reuse"]["tokens"])


def _add_samples(data: Data, path: Path) -> None:
    """A table of `seconds`, `resident` and, if there is one, `budget`, as long tests write it."""
    try:
        with path.open(newline="", encoding="utf-8") as f:
            rows = [{k: float(row[k]) for k in ("seconds", "resident", "budget") if k in row} for row in csv.DictReader(f)]
        samples = [(row["seconds"], row["resident"]) for row in rows]
    except (KeyError, ValueError, TypeError, csv.Error) as e:
        raise ParameterError(f"{path} is not a table of seconds and resident bytes: {type(e).__name__}: {e}") from e
    if not samples:
        raise ParameterError(f"{path} has no samples")
    if data.memory is None:
        data.memory = samples
        data.budgets = [(row["seconds"], row["budget"]) for row in rows if row.get("budget")]


def _add_trace(data: Data, path: Path) -> None:
    import numpy as np

    from ..trace import Trace

    trace = Trace.load(path)
    ids, n_experts = trace.ids, trace.n_experts
    # of a prompt, the last layer may not have been computed for every token; layers may select fewer than others
    known = np.asarray(trace.weights > 0)
    _name(data, trace.meta.get("model") or path.name)
    data.facts.append(("trace", f"{trace.n_tokens:,} tokens, {len(trace.lens)} sequences, top {trace.k} of {n_experts}"))
    rows = list(range(trace.n_layers))
    if data.uses is None:
        data.blocks = rows
        data.uses = [np.bincount(ids[:, layer][known[:, layer]], minlength=n_experts).tolist() for layer in rows]
    if data.reuse is None:
        data.reuse = reuse_distances(ids, n_experts, known).tolist()
        data.reuse_tokens = trace.n_tokens
