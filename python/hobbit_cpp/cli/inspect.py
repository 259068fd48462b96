"""hobbit inspect: what a GGUF holds, and which memory budgets make sense."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .output import check_writable, write_json

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what a model holds and which budgets make sense",
        description="Shows architecture, experts, sizes, types and sensible memory budgets of a GGUF. Reads its header only.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?", help="a GGUF; of a split one any part")
    parser.add_argument(
        "--json",
        metavar="OUT",
        nargs="?",
        const="-",
        help="no table but JSON, to OUT or to stdout",
    )
    parser.add_argument("--low-model", metavar="SIDECAR", help="its sidecar; none: no sidecar (default: MODEL.low.gguf)")
    parser.add_argument("-v", "--verbose", action="store_true", help="a traceback when something fails")
    parser.set_defaults(function=run)


def run(args: argparse.Namespace) -> int:
    """Inspects."""
    if args.file is None and args.json not in (None, "-"):
        args.file, args.json = Path(args.json), "-"  # inspect --json FILE
    if args.file is None:
        print("hobbit inspect: the name of a file is missing", file=sys.stderr)
        return 2
    if args.json is not None:
        check_writable(Path(args.json))
    from hobbit_cpp.inspection import inspect_file

    facts = inspect_file(args.file, args.low_model)
    if args.json is None:
        print_table(facts)
        return 0
    write_json(Path(args.json), facts)
    return 0


def print_table(facts: dict[str, Any]) -> None:
    """For people, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(facts):
        table.add_row(Text(name, style="bold"), Text(value))
    # a pipe has no width: nothing is folded then
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(Text(_printable(facts["files"][0]), style="bold"))
    console.print(table)


def _printable(name: str) -> str:
    """A name of a file whose bytes are not UTF-8 cannot be printed as it is."""
    return name.encode("utf-8", "replace").decode()


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from hobbit_cpp._memory import human

    def size(key: str) -> str:
        return human(facts[key])

    parts = len(facts["files"])
    rows = [("file", size("bytes") + (f" in {parts} parts" if parts > 1 else ""))]
    if facts["kind"] == "sidecar":
        rows.append(("kind", "sidecar: the low-precision copies of a model"))
        rows.append(("low", f"{size('bytes_low')}  {_types(facts, 'low')}"))
        return rows
    rows.append(("architecture", facts["architecture"] + (f" ({facts['name']})" if facts["name"] else "")))
    if not facts["moe"]:
        rows.append(("layers", str(facts["layers"])))
        rows.append(("types", _types(facts, "dense")))
        rows.append(("experts", "none: a dense model, there is nothing to offload (load it with offload=None)"))
        return rows
    shared = f", {facts['shared_experts']} shared" if facts["shared_experts"] else ""
    rows += [
        ("layers", f"{facts['layers']}, {facts['moe_layers']} with experts"),
        ("experts", f"{facts['experts']} in a layer, {facts['experts_used']} for each token{shared}"),
        ("dense", f"{size('bytes_dense')}  {_types(facts, 'dense')}"),
        ("high", f"{size('bytes_high')}  {_types(facts, 'high')}"),
        ("low", f"{size('bytes_low')}  {_types(facts, 'low')}" if facts["bytes_low"] else "none (hobbit convert makes them)"),
        ("one expert", f"{size('bytes_expert_high')} high, {size('bytes_expert_low')} low"),
        ("one token", f"{size('bytes_cycle_high')} high, {size('bytes_cycle_low')} low"),
    ]
    sidecar = facts["sidecar"]
    if sidecar is not None:
        rows.append(("sidecar", _printable(sidecar["path"]) + ("" if sidecar["belongs"] else f": refused: {sidecar['reason']}")))
    calibration = facts["calibration"]
    if calibration is not None:
        why = "" if calibration["belongs"] else f": not used: {calibration['reason']}"
        rows.append(("calibration", calibration["path"] + why))
        for name, q in calibration["qualities"].items():
            served = f"{q['high']:.2f} high, {q['low']:.2f} low, {q['skipped']:.2f} skipped"
            rows.append(("", f"{name:>4}: {served}, {q['bytes']:.0%} of the bytes"))
    io = facts["direct_io"]
    if io is not None:
        how = f"aligned to {io['alignment']}" if io["alignment"] > 1 else "through the page cache"
        rows.append(
            ("reads", f"{how}; {io['slices_aligned']} of {io['slices']} slices aligned, {io['read_beyond']:.1%} read beyond")
        )
    if facts["context_length"]:
        rows.append(("context", f"{facts['context_length']} tokens"))
    if facts["kv_bytes_per_1k_tokens"] is not None:
        rows.append(("KV cache", f"{size('kv_bytes_per_1k_tokens')} for 1024 tokens"))
    if not facts["offload"]["possible"]:
        rows.append(("offload", f"not possible: {facts['offload']['reason']}"))
    budgets = facts["budgets"]
    if budgets is not None:
        rows.append(("memory", f"for a context of {budgets['n_ctx']} tokens:"))
        names = {"smallest": "smallest", "one_cycle": "one token's experts", "experts_25_percent": "25 % of the experts"}
        names.update(experts_50_percent="50 % of the experts", experts_100_percent="all experts")
        rows += [("", f"{human(budgets[key]):>10}  {name}") for key, name in names.items()]
    return rows


def _types(facts: dict[str, Any], role: str) -> str:
    return ", ".join(f"{row['type']} {row['share']:.0%}" for row in facts["types"][role])
