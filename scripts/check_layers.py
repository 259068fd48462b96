#!/usr/bin/env python3
"""A C++ file of the core includes its own layer and those to its left, nothing else of ours.

    base <- io <- cache <- engine <- ggml <- capi
            policy (includes base only) <- engine <- replay <- capi

The public headers of ggml and llama.cpp may be included anywhere, their private ones only in csrc/ggml.
Run without arguments from anywhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Dict, FrozenSet, List

ROOT = Path(__file__).resolve().parent.parent / "csrc"

MAY_INCLUDE: Dict[str, FrozenSet[str]] = {
    "base": frozenset({"base"}),
    "io": frozenset({"base", "io"}),
    "cache": frozenset({"base", "io", "cache"}),
    "policy": frozenset({"base", "policy"}),
    "engine": frozenset({"base", "io", "cache", "policy", "engine"}),
    "ggml": frozenset({"base", "io", "cache", "policy", "engine", "ggml"}),
    "replay": frozenset({"base", "io", "cache", "policy", "engine", "replay"}),
    "capi": frozenset({"base", "io", "cache", "policy", "engine", "ggml", "replay", "capi"}),
}
PUBLIC = frozenset(
    ["ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpp.h", "ggml-cpu.h", "gguf.h", "llama.h", "llama-cpp.h"],
)
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')


def problems_of(path: Path, root: Path) -> List[str]:
    found: List[str] = []
    layer = path.relative_to(root).parts[0]
    if layer not in MAY_INCLUDE:
        return [f"{path}: no such layer: {layer}"]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        m = INCLUDE.match(line)
        if not m:
            continue
        name = m[1] or m[2]
        places = [path.parent / name, root / name] if m[1] else [root / name]
        target = next((p.resolve() for p in places if p.is_file()), None)
        where = f"csrc/{path.relative_to(root)}:{number}"
        if target is not None and root in target.parents:
            if target == root / "hobbit.h":
                continue
            other = target.relative_to(root).parts[0]
            if other not in MAY_INCLUDE[layer]:
                found.append(f"{where}: {layer} must not include {other} ({name})")
        elif layer != "ggml" and (m[1] or name.startswith(("llama", "ggml", "gguf"))) and name not in PUBLIC:
            found.append(f"{where}: {layer} must not include {name}: not ours, and not a public header of upstream")
    return found


def check(root: Path = ROOT) -> List[str]:
    root = root.resolve()
    files = sorted(p for p in root.rglob("*") if p.suffix in (".h", ".cpp", ".c") and p.parent != root)
    return [problem for path in files for problem in problems_of(path, root)]


def main() -> int:
    found = check()
    for problem in found:
        print(problem)
    print(f"{len(found)} problems" if found else "the layers of csrc/ are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
