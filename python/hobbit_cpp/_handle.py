"""A session of the core (csrc/hobbit.h): opened on a file, checked, closed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Dict

from . import _sidecar
from ._lib import call, core
from .errors import HobbitError, SidecarError, StateError, from_c
from .params import OffloadParams


@dataclass(frozen=True)
class ModelInfo:
    """What a model file holds; sizes in bytes. See hobbit_model_info in csrc/hobbit.h."""

    n_layer: int
    n_moe_layer: int
    n_expert: int
    n_expert_used: int
    has_low: bool
    bytes_dense: int
    bytes_parsed: int
    bytes_high: int
    bytes_low: int
    bytes_expert_high: int
    bytes_expert_low: int
    bytes_cycle: int
    slot_high: int
    slot_low: int
    pool_min: int
    pool_max: int
    can_resize: bool
    direct_io: bool
    io_alignment: int
    bytes_tables: int
    bytes_embeddings: int
    bytes_rows_kept: int


def struct_fields(ffi: Any, struct: Any) -> Dict[str, Any]:
    """Plain numbers of a C struct by name."""
    ctype = ffi.typeof(struct)
    return {
        name: getattr(struct, name)
        for name, f in (ctype.item if ctype.kind == "pointer" else ctype).fields
        if f.type.kind == "primitive" and name != "struct_size"
    }


class Handle:
    """Opened on a file."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self._ffi, self._lib = core()
        self.params = params
        self.path = path
        self._pid = os.getpid()
        self._handle = self._ffi.NULL
        c = self._new_struct("hobbit_params")
        call(self._lib.hobbit_params_init, c, params.mode.encode())
        params.apply_to(c)
        self.low_path = _sidecar.low_path(path, params.low_model)
        low = self._ffi.NULL if self.low_path is None else os.fsencode(self.low_path)
        error = self._ffi.new("hobbit_error *")
        self._handle = self._lib.hobbit_session_init(os.fsencode(path), low, c, error)
        if self._handle == self._ffi.NULL:
            raise self._refused(from_c(self._ffi, self._lib, error))
        info = self._new_struct("hobbit_model_info")
        call(self._lib.hobbit_session_info, self._handle, info)
        fields = struct_fields(self._ffi, info)
        fields.update({name: bool(fields[name]) for name in ("has_low", "can_resize", "direct_io")})
        self.info = ModelInfo(**fields)

    def _refused(self, error: HobbitError) -> HobbitError:
        """An error of opening. Nobody asked for a sidecar that was found: then it says what to do about it."""
        if self.params.low_model is None and isinstance(error, SidecarError):
            return SidecarError(
                f"{error} (found beside the model by its name: remove it, name another with low_model=..., or ignore it with "
                "low_model=False)"
            )
        return error

    def _new_struct(self, name: str) -> Any:
        struct = self._ffi.new(f"{name} *")
        struct.struct_size = self._ffi.sizeof(name)
        return struct

    def _alive(self) -> Any:
        if self._handle == self._ffi.NULL:
            raise StateError("the model is closed")
        if self._pid != os.getpid():
            raise StateError("the model was loaded before a fork, and its threads stayed in the parent: load it in this process")
        return self._handle

    def _ours(self) -> bool:
        """Whether there are threads to stop: not after close, and not in a child made by fork."""
        return self._handle != self._ffi.NULL and self._pid == os.getpid()

    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return _text(self._ffi, self._lib.hobbit_session_fingerprint, self._alive())

    def close(self) -> None:
        if self._ours():
            self._lib.hobbit_session_free(self._handle)
        self._handle = self._ffi.NULL

    def __del__(self) -> None:
        # One that was only looked at. Not where the constructor failed, nor when the interpreter is being taken down.
        if getattr(self, "_handle", None) is not None and not sys.is_finalizing():
            self.close()


def fingerprint(path: str) -> str:
    """What tells the routed experts of a model from those of another: see csrc/io/fingerprint.h.

    Raises:
        ModelFileError, ModelFormatError, NotMoeError, UnsupportedModelError: nothing that could be offloaded.
    """
    ffi, lib = core()
    return _text(ffi, lib.hobbit_fingerprint, os.fsencode(path))


def _text(ffi: Any, function: Any, of: Any) -> str:
    text = ffi.new("char[128]")
    call(function, of, text, len(text))
    out: str = ffi.string(text).decode()
    return out
