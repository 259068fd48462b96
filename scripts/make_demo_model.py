#!/usr/bin/env python3
"""Make a real mixture-of-experts GGUF from a small dense model, without training.

Every feed-forward layer of SmolLM2-135M-Instruct is cut into experts that are fitted
in closed form; the router follows clusters of the layer's inputs. The result has the
Mixtral layout, so every llama.cpp tool reads it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Optional

from demo_model import source
from demo_model.build import PRESETS, make


def main(arguments: Optional[list[str]] = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--corpus", type=Path, help="text file (default: prose that comes with Python)")
    parser.add_argument("--type", choices=("F16", "Q8_0"), default="Q8_0")
    parser.add_argument("--source", type=Path, help="the dense model as a GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        make(PRESETS[args.preset], source.find(args.source), args.out, args.corpus, args.type, args.seed)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; no file was left\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
