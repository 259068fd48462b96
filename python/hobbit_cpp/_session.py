"""A session of the core as a Python object: one loaded model."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Tuple

from . import _heat
from ._budget import Budgeted
from ._lib import call
from .errors import HobbitError, HobbitWarning, from_c
from .params import OffloadParams

if TYPE_CHECKING:
    from .calibrate.dial import Feedback
    from .trace import Trace


def c_routing(ffi: Any, trace: Optional[Trace]) -> Tuple[Any, List[Any]]:
    """(hobbit_routing *, what it points into and has to be kept as long); NULL for None."""
    if trace is None:
        return ffi.NULL, []
    import numpy as np

    c = ffi.new("hobbit_routing *")
    c.struct_size = ffi.sizeof("hobbit_routing")
    c.n_rows, c.n_layer, c.k = trace.ids.shape
    ids = np.ascontiguousarray(trace.ids, np.uint16)
    weights = np.ascontiguousarray(trace.weights, np.float32)
    c.ids, c.weights = ffi.from_buffer("uint16_t[]", ids), ffi.from_buffer("float[]", weights)
    keep = [ids, weights]
    if trace.predicted_ids is not None and trace.predicted_weights is not None:
        c.depth, c.n_predicted = trace.predicted_ids.shape[2:]
        guess = np.ascontiguousarray(trace.predicted_ids, np.uint16)
        guess_weights = np.ascontiguousarray(trace.predicted_weights, np.float32)
        c.predicted = ffi.from_buffer("uint16_t[]", guess)
        c.predicted_weights = ffi.from_buffer("float[]", guess_weights)
        keep += [guess, guess_weights]
    return c, keep


class Session(Budgeted):
    """Opened on a file, bound to a thread while llama.cpp loads it, started when the memory left for experts is known."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self._heat: Optional[_heat.HeatFile] = None
        self.feedback: Optional[Feedback] = None
        super().__init__(path, params)

    # ---- what llama.cpp is given ----

    def buft_overrides(self) -> int:
        """Address for llama_model_params.tensor_buft_overrides."""
        return int(self._ffi.cast("uintptr_t", self._lib.hobbit_session_buft_overrides(self._alive())))

    def abort_callback(self) -> int:
        """Address for llama_context_params.abort_callback."""
        return int(self._ffi.cast("uintptr_t", self._lib.hobbit_abort_callback()))

    def address(self) -> int:
        """Address for llama_context_params.abort_callback_data."""
        return int(self._ffi.cast("uintptr_t", self._alive()))

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Expert tensors of the model that this thread loads meanwhile belong to this session."""
        self._lib.hobbit_session_bind_thread(self._alive())
        try:
            yield
        finally:
            self._lib.hobbit_session_bind_thread(self._ffi.NULL)

    def start(self, context: int, extra: int, n_ubatch: int, n_least: int, lends: bool) -> None:
        """Makes the expert pool out of what the budget leaves, and starts the threads.

        Args:
            context: address of the llama_context.
            extra: bytes that the caller will come to use beside what it holds now.
            n_ubatch: tokens of the largest batch.
            n_least: of the largest batch that there has to be room for; longer ones are cut by `largest_batch`.
            lends: the pool lends larger ones than a token their buffers, which takes that every batch comes by `decoding`.
        """
        pool = self._divide(context, extra, n_ubatch, n_least, lends)
        call(self._lib.hobbit_session_start, self._alive(), pool)
        ctx = self._ffi.cast("void *", context)
        call(self._lib.hobbit_session_keep_threads, self._alive(), ctx)
        stats = self.stats()
        self._whole_pool = self.pool_bytes()
        if self.params.yield_memory:
            self._yield_memory()
        if _heat.wanted(self.params.heat):
            self._warm()
        cycle = self.info.n_moe_layer * self.info.n_expert_used
        if stats.slots_high < cycle:
            warnings.warn(
                f"the expert pool holds {stats.slots_high} experts, less than the {cycle} that one token uses: most are read "
                "from disk for every token. More memory helps a lot",
                HobbitWarning,
                stacklevel=4,
            )
        if not stats.direct_io:
            warnings.warn(
                f"{self.path} lies on a file system without direct I/O: experts are read through the page cache",
                HobbitWarning,
                stacklevel=4,
            )

    def _warm(self) -> None:
        """Has what earlier runs used most read into the empty pool, and keeps what this one uses."""
        with contextlib.suppress(HobbitError):
            file = _heat.HeatFile(self.fingerprint(), self.info.n_moe_layer, self.info.n_expert)
            if not self._heat_floats():
                return  # the eviction rule keeps no rates
            self._heat = file
            kept = file.load()
            if kept is not None:
                heat = self._ffi.from_buffer("hobbit_heat[]", kept)
                call(self._lib.hobbit_session_warm, self._alive(), heat, len(heat))

    def _heat_floats(self) -> bytes:
        """As in the file; empty where no rates are kept."""
        handle = self._alive()
        n = int(self._lib.hobbit_session_heat(handle, self._ffi.NULL, 0))
        heat = self._ffi.new("hobbit_heat[]", n)
        self._lib.hobbit_session_heat(handle, heat, n)
        return bytes(self._ffi.buffer(heat))

    # ---- running ----

    def set_thresholds(self, t1: float, t2: float) -> None:
        """Other T1, T2 from the next batch on."""
        call(self._lib.hobbit_session_set_thresholds, self._alive(), t1, t2)
        self._thresholds = (t1, t2)

    def set_sensitivity(self, a: Optional[Sequence[float]]) -> None:
        """How much each MoE layer suffers from low precision (hobbit_session_set_sensitivity); None: by eq. 2 again."""
        values = self._ffi.NULL if a is None else self._ffi.new("float[]", list(a))
        call(self._lib.hobbit_session_set_sensitivity, self._alive(), values, len(a or ()))

    def begin_sequence(self) -> None:
        self._lib.hobbit_session_begin_sequence(self._alive())

    @contextlib.contextmanager
    def decoding(self, n_tokens: int) -> Iterator[None]:
        """Around calls of llama_decode, of so many tokens: makes room, times them, and turns a failed read into its exception."""
        handle = self._alive()
        begin = time.perf_counter()
        self._make_room(n_tokens)
        self._lib.hobbit_session_decode_begin(handle)
        try:
            yield
            self._lib.hobbit_session_decode_end(handle)
            if self.feedback is not None:
                self.feedback.after_decode(self._served)
        except RuntimeError as e:
            pending = self.pending_error()
            if pending is not None:
                raise pending from e
            raise
        finally:
            self.eval_seconds += time.perf_counter() - begin
            if self._heat is not None:
                self._heat.decoded(self._heat_floats)
            if self._recorded is not None:
                self._recorded.take()

    def pending_error(self) -> Optional[HobbitError]:
        """The error that stopped the last llama_decode; it is cleared."""
        error = self._ffi.new("hobbit_error *")
        status = self._lib.hobbit_session_take_error(self._alive(), error)
        return None if status == self._lib.HOBBIT_OK else from_c(self._ffi, self._lib, error)

    def cancel(self) -> None:
        """Stops the running llama_decode; from any thread. Until clear_cancel() every other one stops too."""
        if self._ours():
            self._lib.hobbit_session_cancel(self._handle)

    def clear_cancel(self) -> None:
        if self._ours():
            self.pending_error()

    def set_routing(self, trace: Optional[Trace]) -> None:
        """From the next batch on the routing of `trace` instead of the model's own; None: its own again."""
        routing, keep = c_routing(self._ffi, trace)
        call(self._lib.hobbit_session_set_routing, self._alive(), routing)
        del keep  # copied

    def stop(self) -> None:
        """Ends the threads. Before the llama model is freed: they look at its routers."""
        if self._ours():
            if self._monitor is not None:
                self._monitor.end()
            if self._heat is not None:
                if self._heat.used:
                    self._heat.save(self._heat_floats())
                self._heat = None  # once
            with self._resizing:
                self._lib.hobbit_session_stop(self._handle)
