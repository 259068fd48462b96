"""Ask llama.cpp which tensors a model with some metadata has."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, List, Tuple

from hobbit_cpp.llama import llama_cpp

_c: Any = llama_cpp.llama_cpp


class _GgmlTensor(ctypes.Structure):
    """How a ggml_tensor begins."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


class _InitParams(ctypes.Structure):
    """gguf_init_params"""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def tensors_of(metadata: Path) -> List[Tuple[str, Tuple[int, ...]]]:
    """Name and shape (slowest axis first) of each tensor of the model that a GGUF without tensors describes.

    Optional ones too. Raises ValueError when llama.cpp cannot make that model.
    """
    lib = _c._lib
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_n_dims.argtypes = [ctypes.c_void_p]
    out: List[Tuple[str, Tuple[int, ...]]] = []

    def seen(tensor: int, _data: Any) -> None:
        ne = _GgmlTensor.from_address(tensor).ne
        n_dims = lib.ggml_n_dims(tensor)
        out.append((lib.ggml_get_name(tensor).decode(), tuple(ne[i] for i in reversed(range(n_dims)))))

    llama_cpp._logger.set_verbose(False)  # errors only
    context = lib.gguf_init_from_file(str(metadata).encode(), _InitParams(True, None))
    params = _c.llama_model_default_params()
    params.load_mtp = True
    model = _c.llama_model_init_from_user(context, _c.llama_model_set_tensor_data_t(seen), None, params)
    lib.gguf_free(context)
    if not model:
        raise ValueError(f"llama.cpp makes no model of {metadata}")
    _c.llama_model_free(model)
    return out
