"""Finds and loads the libraries of this package, and refuses what does not fit together.

Two steps, since offload=None must load none of our engine:

- load_bindings() makes llama_cpp use the libllama in hobbit_cpp/lib and returns the module. Needed for every model.
- core() loads the cffi module, and with it libhobbit. Called at the first use of the engine, never at import.

Importing this module loads no library: it checks versions and sets LLAMA_CPP_LIB_PATH, which llama_cpp reads when it is
imported. That setting stays, so that parts of llama_cpp that are imported later never mix in the stock libraries.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple, Optional

from . import _log
from .errors import from_c

try:
    from . import _build_info
except ImportError as e:
    raise ImportError(
        "hobbit_cpp is not built: this is its source folder without the libraries. Install it with `pip install .` in "
        "the repository (or build it in place: sh scripts/dev.sh)."
    ) from e

LIB_DIR = Path(__file__).resolve().parent / "lib"
UPSTREAM_LIBRARIES = ("libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu.so")

version: str = _build_info.VERSION
upstream_version: str = _build_info.UPSTREAM_VERSION
upstream_commit: str = _build_info.UPSTREAM_COMMIT
patches: str = _build_info.PATCHES


class Core(NamedTuple):
    """The two objects of the cffi module."""

    ffi: Any
    lib: Any


_lock = threading.RLock()
_bindings: Optional[ModuleType] = None
_core: Optional[Core] = None


def _check_installed(installed: Optional[str]) -> None:
    """llama-cpp-python must be the release whose llama.cpp we carry: its structs are laid out for that one."""
    how = f"Install it: pip install 'llama-cpp-python=={upstream_version}'"
    if installed is None:
        raise ImportError(f"hobbit_cpp {version} needs llama-cpp-python {upstream_version}, none is installed. {how}")
    if installed.split("+")[0] != upstream_version:
        raise ImportError(
            f"hobbit_cpp {version} was built for llama-cpp-python {upstream_version} (llama.cpp {upstream_commit}), "
            f"but llama-cpp-python {installed} is installed. {how}"
        )


def _installed_version() -> Optional[str]:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def _patch_id(library: ctypes.CDLL) -> Optional[str]:
    """The patches a libllama was built with; None for a libllama that is not ours."""
    try:
        function = library.hobbit_patch_id
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    function.argtypes = []
    value = function()
    return value.decode() if isinstance(value, bytes) else None


def _check_library(library: ctypes.CDLL) -> None:
    """The libllama that llama_cpp really loaded must be ours, of this build."""
    found = _patch_id(library)
    if found is None:
        raise ImportError(
            f"llama_cpp was imported before hobbit_cpp and uses another libllama ({library._name}), which cannot "
            "offload experts. Import hobbit_cpp first, before anything that imports llama_cpp, and use "
            "hobbit_cpp.Llama (with offload=None it is the stock one)."
        )
    if found != patches:
        raise ImportError(
            f"the libllama that was loaded ({library._name}) was built with patches {found}, but hobbit_cpp {version} "
            f"was built with {patches}. Reinstall hobbit-cpp; if two copies of it are on the path, remove one."
        )


def _check_mapped() -> None:
    """Dependencies are found by SONAME: a library of the same name that was loaded before ours silently wins."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    mapped = {line.split(None, 5)[5] for line in maps.splitlines() if line.endswith(".so")}
    for name in UPSTREAM_LIBRARIES:
        if os.path.realpath(LIB_DIR / name) not in mapped:
            others = sorted(p for p in mapped if Path(p).name == name)
            raise ImportError(
                f"{LIB_DIR / name} was not loaded, since the process already holds "
                f"{', '.join(others) or 'another one'}. Import hobbit_cpp before the package that brings it."
            )


def _prepare() -> None:
    _check_installed(_installed_version())
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        _check_library(loaded._lib)
        return
    for name in UPSTREAM_LIBRARIES:
        if not (LIB_DIR / name).is_file():
            raise ImportError(f"{LIB_DIR / name} is missing: hobbit-cpp is not installed whole, install it again")
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    if before is not None and Path(before).resolve() != LIB_DIR:
        warnings.warn(
            f"LLAMA_CPP_LIB_PATH={before} is not used: hobbit_cpp brings its own libllama ({LIB_DIR})",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(LIB_DIR)


def load_bindings() -> ModuleType:
    """The module llama_cpp, bound to our libllama."""
    global _bindings
    with _lock:
        if _bindings is None:
            module = importlib.import_module("llama_cpp")
            _check_library(importlib.import_module("llama_cpp.llama_cpp")._lib)
            _check_mapped()
            _log.install(module.llama_cpp)
            _bindings = module
        return _bindings


def _text(ffi: Any, pointer: Any) -> str:
    value: bytes = ffi.string(pointer)
    return value.decode()


def _check_core(core: Core) -> None:
    ffi, lib = core
    compiled, loaded = int(lib.HOBBIT_ABI_VERSION), int(lib.hobbit_abi_version())
    facts = (
        ("ABI", str(compiled), str(loaded)),
        ("version", version, _text(ffi, lib.hobbit_version())),
        ("llama.cpp", upstream_commit, _text(ffi, lib.hobbit_upstream_commit())),
        ("patches", patches, _text(ffi, lib.hobbit_patches())),
        ("patches of the loaded libllama", patches, _text(ffi, lib.hobbit_loaded_patches())),
    )
    wrong = [f"{what}: {want} expected, {have} found" for what, want, have in facts if want != have]
    if wrong:
        raise ImportError(
            f"the libraries of hobbit_cpp do not belong together ({'; '.join(wrong)}). Reinstall hobbit-cpp; in a "
            "source tree, build it again (sh scripts/dev.sh)."
        )


def core() -> Core:
    """The core (libhobbit) through cffi, loaded at the first call."""
    global _core
    if _core is not None:
        return _core
    with _lock:
        if _core is None:
            try:
                module = importlib.import_module("hobbit_cpp._hobbit")
            except ImportError as e:
                raise ImportError(f"the core of hobbit_cpp could not be loaded from {LIB_DIR}: {e}") from e
            loaded = Core(module.ffi, module.lib)
            _check_core(loaded)
            _check_mapped()
            _core = loaded
        return _core


def call(function: Callable[..., int], *args: Any) -> None:
    """Calls one of the core's functions that take a `hobbit_error *` after `args`, and raises the error that it gives."""
    ffi, lib = core()
    error = ffi.new("hobbit_error *")
    if function(*args, error) != lib.HOBBIT_OK:
        raise from_c(ffi, lib, error)


def core_is_loaded() -> bool:
    """Whether core() was called: false as long as only offload=None is used."""
    return _core is not None


_prepare()
