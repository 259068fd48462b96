"""Libraries that only tests use. Where libllama without our patches lies: for tests that compare with it, bit for bit, in a
process of its own.

    env = unpatched_env()
    subprocess.run([sys.executable, "-c", "import llama_cpp; ..."], env=env)

scripts/test.sh builds it beside ours and names the folder in HOBBIT_UNPATCHED_LIB. Without that, it is built here at
the first call (in the cache folder of hobbit-cpp, outside of the clone; minutes, once). Likewise lib_for_tests (tests/cpp) and
HOBBIT_TESTING_LIB.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict

ROOT = Path(__file__).resolve().parents[2]


def _build(*targets: str) -> Path:
    """The build folder, with these targets made."""
    cache = os.environ.get("HOBBIT_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hobbit-cpp"
    )
    build = Path(cache) / "build" / f"unpatched-python{sys.version_info[0]}.{sys.version_info[1]}"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "cmake"
    _leave_to_this_clone(build)
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DHOBBIT_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(configure + [f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run([cmake, "--build", str(build), "-j", "--target", *targets], check=True)
    return build


def _leave_to_this_clone(build: Path) -> None:
    """CMake refuses a build folder that another clone has configured; the objects of upstream in it are as good as ever."""
    known = build / "CMakeCache.txt"
    if known.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in known.read_text():
        known.unlink()
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)


@functools.cache
def lib_for_tests(name: str) -> Path:
    """libhobbit-internals.so or libhobbit-faults.so."""
    named = os.environ.get("HOBBIT_TESTING_LIB")
    beside = os.environ.get("HOBBIT_UNPATCHED_LIB")
    folders = [Path(named)] if named else [Path(beside).parent / "testing"] if beside else []
    folder = next((f for f in folders if (f / name).is_file()), None)
    if folder is None:
        folder = _build("hobbit-internals", "hobbit-faults") / "testing"
    return folder / name


@functools.cache
def unpatched_lib_dir() -> Path:
    named = os.environ.get("HOBBIT_UNPATCHED_LIB")
    folder = Path(named) if named else _build("llama-unpatched") / "unpatched"
    if not (folder / "libllama.so").is_file():
        raise FileNotFoundError(f"no unpatched libllama in {folder}: build it with sh scripts/test.sh")
    return folder


def unpatched_env() -> Dict[str, str]:
    """The environment in which `import llama_cpp` uses the unpatched library."""
    return dict(os.environ, LLAMA_CPP_LIB_PATH=str(unpatched_lib_dir()))
