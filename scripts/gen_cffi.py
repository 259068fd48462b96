#!/usr/bin/env python3
"""Generate the C source of the cffi module hobbit_cpp._hobbit from csrc/hobbit.h: gen_cffi.py HEADER OUT.c

The header is written so that little is needed: typedefs, enums, structs, functions, and integer constants by #define.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import List


def cdef_of(header: str) -> str:
    """The declarations of the header as cffi reads them."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), header, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = text.replace("\\\n", " ")
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", text, flags=re.DOTALL)  # extern "C" { and its end
    out: List[str] = []
    for line in text.split("\n"):
        constant = re.match(r"\s*#\s*define\s+(HOBBIT_\w+)\s+\(?-?(0x[0-9a-fA-F]+|\d+)[uUlL]*\)?\s*$", line)
        if constant:
            out.append(f"#define {constant[1]} ...")
        elif not line.lstrip().startswith("#"):
            out.append(line.replace("HOBBIT_API ", ""))
    return re.sub(r"\n{2,}", "\n", "\n".join(out)).strip() + "\n"


def functions_of(header: str) -> List[str]:
    """The names of the functions the header declares."""
    return re.findall(r"^HOBBIT_API [^;(]*?(hobbit_\w+)\(", header, flags=re.MULTILINE)


def main(argv: List[str]) -> int:
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(cdef_of(Path(argv[1]).read_text(encoding="utf-8")))
    ffi.set_source("hobbit_cpp._hobbit", '#include "hobbit.h"\n', py_limited_api=True)
    ffi.emit_c_code(argv[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
