"""What `llama_cpp.Llama` keeps in fields, and what the offload adds to it."""

from __future__ import annotations

import ctypes
from typing import Any, List

import numpy as np

from . import _lib

_c: Any = _lib.load_bindings().llama_cpp


class UpstreamFields:
    """The structs, the sampler and the arrays of upstream's class, as properties and with the room that they need."""

    # Of `Llama`.
    _session: Any
    _no_alloc: bool
    _progress: Any
    _sampling: int
    _retired: List[Any]
    _n_ctx: int
    _n_vocab: int
    _logits_all: bool
    input_ids: Any
    scores: Any

    # llama_cpp.Llama makes these two structs in its constructor, fills them in and hands them to llama.cpp. As properties
    # they carry what the offload needs on top, whatever the constructor has set.

    @property
    def model_params(self) -> Any:
        params = self.__dict__["_model_params"]
        params.progress_callback = self._progress
        if self._no_alloc:
            params.load_mode = _c.LLAMA_LOAD_MODE_NONE
            params.no_alloc = True
        elif self._session is not None:
            # Dense weights are read once, past the page cache, into anonymous memory.
            params.load_mode = _c.LLAMA_LOAD_MODE_DIRECT_IO
            params.tensor_buft_overrides = self._session.buft_overrides()
        return params

    @model_params.setter
    def model_params(self, value: Any) -> None:
        self.__dict__["_model_params"] = value

    @property
    def context_params(self) -> Any:
        params = self.__dict__["_context_params"]
        if self._session is not None:
            params.abort_callback = ctypes.cast(self._session.abort_callback(), _c.ggml_abort_callback)
            params.abort_callback_data = self._session.address()
        return params

    @context_params.setter
    def context_params(self, value: Any) -> None:
        self.__dict__["_context_params"] = value

    # llama_cpp's sampler refers to itself, so that only a full garbage collection would free it, of which there is one in many
    # answers. It holds n_vocab candidates of 12 bytes, which no budget knows of. So it is freed when the next takes its place.

    @property
    def _sampler(self) -> Any:
        return self.__dict__.get("_sampler_in_use")

    @_sampler.setter
    def _sampler(self, value: Any) -> None:
        before = self._sampler
        self.__dict__["_sampler_in_use"] = value
        if before is not None and before is not value:
            self._retired.append(before)
        self._free_samplers()

    def _free_samplers(self) -> None:
        while self._retired and not self._sampling:
            self._retired.pop().close()

    def _fit_arrays(self) -> None:
        """Room for the tokens and the logits of the whole context.

        llama.cpp rounds n_ctx up to a multiple of 256, and llama_cpp goes by that, but for the arrays that it keeps tokens and
        scores in: with n_ctx=100 it would fail at the 101st token. With a draft model, which needs all logits, it would fail at
        token n_batch. Without logits_all nothing is in `scores`; with offload one row is enough, since states copy it.
        """
        missing = self._n_ctx - len(self.input_ids)
        if missing > 0:
            self.input_ids = np.concatenate([self.input_ids, np.zeros(missing, self.input_ids.dtype)])
        rows = self._n_ctx if self._logits_all else 1 if self._session is not None else len(self.scores)
        if rows != len(self.scores):
            self.scores = np.ndarray((rows, self._n_vocab), dtype=np.single)
