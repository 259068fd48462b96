"""hobbit --version."""

from __future__ import annotations

__all__ = ["version_text"]


def version_text() -> str:
    """The versions of everything that runs, as the libraries themselves say."""
    import hobbit_cpp
    from hobbit_cpp._lib import core

    ffi, lib = core()

    def text(pointer: object) -> str:
        return str(ffi.string(pointer).decode())

    return (
        f"hobbit-cpp {hobbit_cpp.__version__}\n"
        f"llama.cpp {text(lib.hobbit_upstream_commit())}\n"
        f"patches {text(lib.hobbit_patches()) or 'none'}"
    )
