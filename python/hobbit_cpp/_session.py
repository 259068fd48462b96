"""A session of the core as a Python object: one loaded model."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Tuple

from . import _heat, _memory
from ._batches import SMALL, BatchRoom
from ._handle import fingerprint
from ._memory import Size, human
from ._observed import Observed
from ._pressure import Monitor, Yielding, read_all
from .errors import HobbitError, HobbitWarning, MemoryBudgetError, OutOfMemoryError, from_c
from .params import OWN_SLOTS, OffloadParams

if TYPE_CHECKING:
    from .calibrate.dial import Feedback
    from .trace import Trace

# What llama.cpp, ggml's work buffer, samplers and Python take beyond what can be counted before it is used.
_SLACK = 24 << 20
_SLACK_SHARE = 0.01
# Embeddings of fewer bytes are not worth a read for a token.
_FEW_EMBEDDINGS = 16 << 20
# By which two starts of the same process differ.
_ROUGHLY = 4 << 20


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


def everything_fits(budget: int, everything: int) -> bool:
    """Process, weights and the whole pool, and a tenth of that for KV cache and buffers, whose size is not known yet."""
    return budget >= 1.1 * everything


class Session(Observed):
    """Opened on a file, bound to a thread while llama.cpp loads it, started when the memory left for experts is known."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self._base_budget: Optional[int] = None
        self._resizing = threading.Lock()
        self._whole_pool = 0  # its size when nothing had to be given back, beside the batch at hand
        self._room: Optional[BatchRoom] = None
        self._context = self._least = 0
        self._given_back = 0  # of it, because memory is short: see _yield_memory
        self.embeddings_on_disk = False
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

    # ---- memory ----

    def plan(self, memory: Optional[Size]) -> bool:
        """Fixes the budget. False: the dense weights and the smallest pool alone are too much for it."""
        _memory.large_blocks_apart()
        _memory.give_back()
        if memory is not None:
            self._base_budget = _memory.parse_size(memory, of=_memory.total())
        elif self.params.expert_cache is None:
            self._base_budget = _memory.default_budget()
        self.embeddings_on_disk = self.embeddings_leave(self._base_budget, _memory.resident())
        if self.embeddings_on_disk:
            self._lib.hobbit_session_keep_embeddings_on_disk(self._alive())
        needed = _memory.resident() + self.bytes_dense + self._pool_floor()
        return self._base_budget is None or needed + _SLACK <= self._base_budget

    @property
    def bytes_dense(self) -> int:
        """Of the weights that are in memory, without experts."""
        left = self.info.bytes_embeddings - self.info.bytes_rows_kept
        return self.info.bytes_dense - (left if self.embeddings_on_disk else 0)

    @property
    def bytes_embeddings(self) -> int:
        """Of those that may stay on disk."""
        wanted = self.params.embeddings_on_disk
        worth_it = wanted or (wanted is None and self.info.bytes_embeddings >= _FEW_EMBEDDINGS)
        return self.info.bytes_embeddings if worth_it else 0

    def embeddings_leave(self, budget: Optional[int], process: int) -> bool:
        """Whether they stay on disk: where not everything has a place.

        Args:
            budget: None: of experts alone.
            process: what it holds without the model.
        """
        pool = self.info.pool_max if self.params.expert_cache is None else self._pool_floor()
        short = budget is not None and not everything_fits(budget, process + self.info.bytes_dense + pool)
        return self.bytes_embeddings > 0 and (short or self.params.embeddings_on_disk is True)

    def refuse_unloaded(self, context: int, extra: int, n_least: int) -> MemoryBudgetError:
        """The error for a budget that cannot work; `context`: of a model loaded without its weights (no_alloc)."""
        ctx = self._ffi.cast("void *", context)
        sizes = int(self._lib.hobbit_context_resident_bytes(ctx)) + sum(self.fit_batches(context, n_least))
        on_disk = self.info.bytes_high + self.info.bytes_dense - self.bytes_dense
        return self._refusal(_memory.resident() + sizes - on_disk + self.info.bytes_tables + extra)

    def fit_batches(self, context: int, n_tokens: int) -> Tuple[int, int]:
        """hobbit_context_fit: bytes of compute buffers for batches of so many tokens, and of what ggml works in."""
        buffers, work, error = self._ffi.new("uint64_t *"), self._ffi.new("uint64_t *"), self._ffi.new("hobbit_error *")
        ctx = self._ffi.cast("void *", context)
        self._check(self._lib.hobbit_context_fit(ctx, n_tokens, buffers, work, error), error)
        return int(buffers[0]), int(work[0])

    def _refusal(self, held: int) -> MemoryBudgetError:
        """`held`: what the process holds with everything but the expert pool."""
        smallest = int((held + self._pool_floor() + _SLACK) / (1 - _SLACK_SHARE)) + _ROUGHLY
        return MemoryBudgetError(
            f"a memory budget of {human(self._base_budget or 0)} is too small for {self.path}: it needs at least "
            f"{human(smallest)} (dense weights {human(self.bytes_dense)}, expert pool {human(self._pool_floor())}, the "
            "rest is the process itself, KV cache and buffers; a smaller n_ctx, n_batch or n_ubatch helps, and flash attention)"
        )

    def _pool_floor(self) -> int:
        wanted = self.params.expert_cache
        return self.info.pool_min if wanted is None else min(self._parse_pool(wanted), self.info.pool_max)

    def _parse_pool(self, size: Size) -> int:
        return _memory.parse_size(size, of=self.info.pool_max)

    def lends(self) -> bool:
        """Whether the pool can lend large batches memory for their buffers: nobody has given it a size, and it can change it."""
        rule = self.params.eviction or self.params.mode
        return self.params.expert_cache is None and rule not in OWN_SLOTS

    def start(self, context: int, extra: int, n_ubatch: int, n_least: int, lends: bool) -> None:
        """Makes the expert pool out of what the budget leaves, and starts the threads.

        Args:
            context: address of the llama_context.
            extra: bytes that the caller will come to use beside what it holds now.
            n_ubatch: tokens of the largest batch.
            n_least: of the largest batch that there has to be room for; longer ones are cut by `largest_batch`.
            lends: the pool lends larger ones than a token their buffers, which takes that every batch comes by `decoding`.
        """
        ctx = self._ffi.cast("void *", context)
        self._context = context
        held = _memory.resident() + self.info.bytes_tables + extra
        most = self.fit_batches(context, n_ubatch)
        taken = sum(most)
        pool: Optional[int] = None
        if self.params.expert_cache is not None:
            pool = self._parse_pool(self.params.expert_cache)
        if self._base_budget is not None:
            budget = self.memory_budget = self._base_budget
            spare = budget - held - _SLACK - int(budget * _SLACK_SHARE)
            # Where every expert has a place beside the largest batch nothing needs to be lent.
            if lends and spare - taken < self.info.pool_max:
                self._least = taken = sum(self.fit_batches(context, n_least))
                small = self.fit_batches(context, SMALL)
                self._room = BatchRoom(n_ubatch, most, small, spare, self.info.pool_min, self.info.pool_max)
                pool = self._room.pool
            if spare - taken < self._pool_floor():
                raise self._refusal(held + taken)
            pool = spare - taken if pool is None else pool
        held += taken
        assert pool is not None
        pool = min(pool, self.info.pool_max)
        free = _memory.available()
        if pool > free:
            raise MemoryBudgetError(
                f"an expert pool of {human(pool)} does not fit: only {human(free)} of memory are free. "
                f"Give a smaller memory= (at most {human(held + free)})"
            )
        if not self.memory_budget:
            self.memory_budget = held + pool + _SLACK
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_start(self._alive(), pool, error), error)
        self._check(self._lib.hobbit_session_keep_threads(self._alive(), ctx, error), error)
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

    def resize_expert_cache(self, size: Size) -> None:
        """See `Llama.resize_expert_cache`."""
        self._alive()
        wanted = min(self._parse_pool(size), self.info.pool_max)
        with self._resizing:
            before = self.pool_bytes()
            free = _memory.available()
            if wanted - before > free:
                raise MemoryBudgetError(
                    f"an expert pool of {human(wanted)} does not fit: it holds {human(before)}, and only {human(free)} of memory "
                    "are free"
                )
            if self._room is None or wanted < self.info.pool_min:
                self._resize(wanted)  # or says that it is too small
                self.memory_budget += self.pool_bytes() - before
            else:
                room = copy.copy(self._room)
                more = room.resize(wanted, self._least)
                self._resize(room.pool)
                self._room = room
                self.memory_budget += more
            self._whole_pool = self.pool_bytes()
            self._given_back = 0

    def _yield_memory(self) -> None:
        """From now on the pool shrinks while memory is short, and grows again."""
        cycle = self.info.n_moe_layer * self.info.n_expert_used * self.info.slot_high
        to_come = max(0, self.memory_budget - _memory.resident())
        yielding = Yielding(read_all(), to_come, max(self.info.pool_min, cycle))

        def resize(pool: int) -> None:
            with self._resizing:
                # What was whole when it was decided may be lent by now.
                self._given_back = max(0, self._whole_pool - pool)
                self._resize(self._whole_pool - self._given_back)
                if self._given_back == 0:
                    self._whole_pool = self.pool_bytes()  # a number of slots

        self._monitor = Monitor(self.pool_bytes, lambda: self._whole_pool, resize, yielding)

    def _warm(self) -> None:
        """Has what earlier runs used most read into the empty pool, and keeps what this one uses."""
        with contextlib.suppress(HobbitError):
            file = _heat.HeatFile(fingerprint(self.path), self.info.n_moe_layer, self.info.n_expert)
            if not self._heat_floats():
                return  # the eviction rule keeps no rates
            self._heat = file
            kept = file.load()
            if kept is not None:
                error = self._ffi.new("hobbit_error *")
                heat = self._ffi.from_buffer("hobbit_heat[]", kept)
                self._check(self._lib.hobbit_session_warm(self._alive(), heat, len(heat), error), error)

    def _heat_floats(self) -> bytes:
        """As in the file; empty where no rates are kept."""
        handle = self._alive()
        n = int(self._lib.hobbit_session_heat(handle, self._ffi.NULL, 0))
        heat = self._ffi.new("hobbit_heat[]", n)
        self._lib.hobbit_session_heat(handle, heat, n)
        return bytes(self._ffi.buffer(heat))

    def _resize(self, pool: int) -> None:
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_resize(self._alive(), pool, error), error)

    def pool_bytes(self) -> int:
        """What the expert pool may take now."""
        return int(self._stats().pool_bytes)

    # ---- running ----

    def set_thresholds(self, t1: float, t2: float) -> None:
        """Other T1, T2 from the next batch on."""
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_set_thresholds(self._alive(), t1, t2, error), error)
        self._thresholds = (t1, t2)

    def set_sensitivity(self, a: Optional[Sequence[float]]) -> None:
        """How much each MoE layer suffers from low precision (hobbit_session_set_sensitivity); None: by eq. 2 again."""
        error = self._ffi.new("hobbit_error *")
        values = self._ffi.NULL if a is None else self._ffi.new("float[]", list(a))
        self._check(self._lib.hobbit_session_set_sensitivity(self._alive(), values, len(a or ()), error), error)

    def begin_sequence(self) -> None:
        self._lib.hobbit_session_begin_sequence(self._alive())

    def largest_batch(self, wanted: int) -> int:
        """Of so many tokens, those that one llama_decode has memory for."""
        return wanted if self._room is None else self._room.largest(wanted)

    def _make_room(self, n_tokens: int) -> None:
        """Before a batch: it borrows its buffers from the pool, or what an earlier one has borrowed goes back."""
        with self._resizing:  # which another thread may be replacing the room under
            room = self._room
            n = None if room is None else room.to_lay_out(n_tokens)
            if room is None or n is None:
                return
            room.laid_out(n, self.fit_batches(self._context, n))
            self._whole_pool = room.pool
            with contextlib.suppress(MemoryBudgetError, OutOfMemoryError):  # nothing to grow into: the monitor tries again
                self._resize(max(room.pool - self._given_back, self.info.pool_min))
                if self._given_back == 0:
                    self._whole_pool = self.pool_bytes()  # a number of slots

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
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_set_routing(self._alive(), routing, error), error)
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
            self._lib.hobbit_session_stop(self._handle)
