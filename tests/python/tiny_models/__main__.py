"""``python -m tiny_models OUTDIR``: write every tiny model into a directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from . import ARCHITECTURES, SHAPES, write_architecture, write_tiny


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--expert-type", default="F16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one architecture")
    args = parser.parse_args(arguments)
    args.outdir.mkdir(parents=True, exist_ok=True)
    for kind, names, write in (("shape", SHAPES, write_tiny), ("arch", ARCHITECTURES, write_architecture)):
        for name in names:
            if args.only in (None, name):
                path = args.outdir / f"{kind}-{name}-{args.expert_type.lower()}.gguf"
                write(path, name, expert_type=args.expert_type, seed=args.seed)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
