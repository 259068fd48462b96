#!/usr/bin/env python3
"""Talk with a model: `python scripts/chat.py MODEL` is `hobbit chat MODEL`, and takes its flags."""

from __future__ import annotations

import sys

from hobbit_cpp.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
