"""What was built fits together, and what does not is refused at import with a text that says what to do."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Dict, Optional

import pytest

from hobbit_cpp import _lib
from unpatched import unpatched_env

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "third_party"), str(ROOT / "scripts")]

import check_layers  # noqa: E402
import fetch_upstream as upstream  # noqa: E402
import gen_cffi  # noqa: E402


def run(code: str, env: Optional[Dict[str, str]] = None) -> subprocess.CompletedProcess[str]:
    """The code in a Python of its own."""
    clean = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"} if env is None else env
    command = [sys.executable, "-W", "default", "-c", code]
    return subprocess.run(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


MAPPED = "def mapped(n):\n    return any(n in x for x in open('/proc/self/maps'))\n"


# ---- what is loaded, and when


def test_import_does_not_load_the_core() -> None:
    done = run(MAPPED + "import hobbit_cpp\nassert not mapped('libhobbit') and not mapped('_hobbit')")
    assert done.returncode == 0, done.stdout


def test_bindings_use_our_libraries() -> None:
    done = run(
        MAPPED + "from hobbit_cpp import _lib\n_lib.load_bindings()\n"
        "assert mapped(str(_lib.LIB_DIR / 'libllama.so')) and not mapped('libhobbit')\n"
        "import llama_cpp\nllama_cpp.llama_backend_init()"
    )
    assert done.returncode == 0, done.stdout


def test_core_loads_at_the_first_use_and_shares_libllama_with_the_bindings() -> None:
    done = run(
        "from hobbit_cpp import _lib\nllama_cpp = _lib.load_bindings()\nassert not _lib.core_is_loaded()\n"
        "ffi, lib = _lib.core()\nassert _lib.core_is_loaded()\n"
        "assert ffi.string(lib.hobbit_patches()) == ffi.string(lib.hobbit_loaded_patches())\n"
        "found = {x.split()[-1] for x in open('/proc/self/maps') if 'libllama.so' in x}\n"
        "assert found == {str(_lib.LIB_DIR / 'libllama.so')}, found"
    )
    assert done.returncode == 0, done.stdout


def test_core_and_package_are_of_one_build() -> None:
    ffi, lib = _lib.core()
    assert lib.hobbit_abi_version() == lib.HOBBIT_ABI_VERSION
    assert ffi.string(lib.hobbit_version()).decode() == _lib.version


def test_libraries_have_no_version_in_their_name() -> None:
    names = sorted(p.name for p in _lib.LIB_DIR.glob("*.so*"))
    assert names == sorted([*_lib.UPSTREAM_LIBRARIES, "libhobbit.so"])
    for name in names:
        assert not (_lib.LIB_DIR / name).is_symlink()


# ---- what is refused


def test_another_release_of_the_bindings_is_refused() -> None:
    with pytest.raises(ImportError, match=r"llama-cpp-python 0\.0\.1 is installed.*pip install") as e:
        _lib._check_installed("0.0.1")
    assert _lib.upstream_version in str(e.value)


def test_missing_bindings_are_named() -> None:
    with pytest.raises(ImportError, match=r"none is installed.*pip install"):
        _lib._check_installed(None)


def test_the_installed_release_is_accepted() -> None:
    _lib._check_installed(_lib.upstream_version)
    _lib._check_installed(_lib.upstream_version + "+local")


def test_another_libllama_that_was_loaded_first_is_refused() -> None:
    done = run("import llama_cpp\nimport hobbit_cpp", env=unpatched_env())
    assert done.returncode != 0
    assert "ImportError" in done.stdout and "Import hobbit_cpp first" in done.stdout


def test_our_libllama_that_was_loaded_first_is_fine() -> None:
    env = dict(os.environ, LLAMA_CPP_LIB_PATH=str(_lib.LIB_DIR))
    done = run("import llama_cpp\nfrom hobbit_cpp import _lib\n_lib.load_bindings()", env=env)
    assert done.returncode == 0, done.stdout


def test_another_setting_of_the_library_path_is_overruled_with_a_warning() -> None:
    done = run("from hobbit_cpp import _lib\n_lib.load_bindings()", env=unpatched_env())
    assert done.returncode == 0, done.stdout
    assert "RuntimeWarning: LLAMA_CPP_LIB_PATH" in done.stdout


def test_libraries_of_another_build_are_refused_with_all_the_numbers() -> None:
    class FFI:
        @staticmethod
        def string(value: bytes) -> bytes:
            return value

    lib = types.SimpleNamespace(
        HOBBIT_ABI_VERSION=1,
        hobbit_abi_version=lambda: 2,
        hobbit_version=lambda: b"9.9.9",
        hobbit_upstream_commit=lambda: _lib.upstream_commit.encode(),
        hobbit_patches=lambda: _lib.patches.encode(),
        hobbit_loaded_patches=lambda: b"others",
    )
    with pytest.raises(ImportError, match="do not belong together") as e:
        _lib._check_core(_lib.Core(FFI, lib))
    for part in ("ABI: 1 expected, 2 found", "9.9.9 found", "others found"):
        assert part in str(e.value)
    assert "llama.cpp" not in str(e.value)


# ---- one place for each fact


def test_the_dependency_is_the_pinned_release() -> None:
    pin = upstream.read_pin(ROOT / "third_party" / "llama-cpp-python.pin")
    assert f'"llama-cpp-python=={pin.version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (pin.version, pin.llama_cpp) == (_lib.upstream_version, _lib.upstream_commit)
    assert importlib.metadata.version("llama-cpp-python") == pin.version


def test_every_function_of_the_header_is_in_the_cffi_module() -> None:
    header = (ROOT / "csrc" / "hobbit.h").read_text(encoding="utf-8")
    _, lib = _lib.core()
    declared = gen_cffi.functions_of(header)
    assert "hobbit_version" in declared
    assert [name for name in declared if not hasattr(lib, name)] == []


# ---- the core's own order


def test_layers_of_the_core_are_in_order() -> None:
    assert check_layers.check() == []


def test_the_layer_check_finds_a_breach(tmp_path: Path) -> None:
    for layer, text in (("base", '#include "../io/file.h"\n'), ("io", '#include "ggml-impl.h"\n')):
        (tmp_path / layer).mkdir()
        (tmp_path / layer / "file.h").write_text(text, encoding="utf-8")
    found = check_layers.check(tmp_path)
    assert len(found) == 2
    assert "base must not include io" in found[0] and "io must not include ggml-impl.h" in found[1]
