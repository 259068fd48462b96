"""A session of the core (csrc/hobbit.h) as a Python object: one loaded model."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

from . import _heat, _lib, _memory, _recording, _sidecar
from ._memory import Size, human
from ._pressure import Monitor, Yielding, read_all
from .errors import HobbitError, HobbitWarning, MemoryBudgetError, SidecarError, StateError, from_c
from .params import OffloadParams
from .stats import LayerCounts, OffloadStats, Served

if TYPE_CHECKING:
    from .calibrate.dial import Feedback
    from .trace import Trace

# What llama.cpp, ggml's work buffer, samplers and Python take beyond what can be counted before it is used.
_SLACK = 24 << 20
_SLACK_SHARE = 0.01
# By which two starts of the same process differ.
_ROUGHLY = 4 << 20


@dataclass(frozen=True)
class ModelInfo:
    """What a model file holds; sizes in bytes. See hobbit_model_info in csrc/hobbit.h."""

    n_layer: int
    n_moe_layer: int
    n_expert: int
    n_expert_used: int
    has_low: bool
    bytes_dense: int
    bytes_high: int
    bytes_low: int
    bytes_expert_high: int
    bytes_expert_low: int
    bytes_cycle: int
    slot_high: int
    slot_low: int
    pool_min: int
    pool_max: int
    direct_io: bool
    io_alignment: int


def _struct_fields(ffi: Any, struct: Any) -> Dict[str, Any]:
    """Plain numbers of a C struct by name."""
    ctype = ffi.typeof(struct)
    return {
        name: getattr(struct, name)
        for name, f in (ctype.item if ctype.kind == "pointer" else ctype).fields
        if f.type.kind == "primitive" and name != "struct_size"
    }


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


class Session:
    """Opened on a file, bound to a thread while llama.cpp loads it, started when the memory left for experts is known."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self._ffi, self._lib = _lib.core()
        self.params = params
        self.path = path
        self.eval_seconds = 0.0
        self.memory_budget = 0
        self._base_budget: Optional[int] = None
        self._resizing = threading.Lock()
        self._whole_pool = 0  # its size when nothing had to be given back
        self._monitor: Optional[Monitor] = None
        self._heat: Optional[_heat.HeatFile] = None
        self._pid = os.getpid()
        self._recorded: Optional[_recording.MemorySamples] = None
        self.feedback: Optional[Feedback] = None
        self._thresholds = None if params.t1 is None or params.t2 is None or params.exact else (params.t1, params.t2)
        self._handle = self._ffi.NULL
        error = self._ffi.new("hobbit_error *")
        c = self._new_struct("hobbit_params")
        self._check(self._lib.hobbit_params_init(c, params.mode.encode(), error), error)
        params.apply_to(c)
        self.low_path = _sidecar.low_path(path, params.low_model)
        low = self._ffi.NULL if self.low_path is None else os.fsencode(self.low_path)
        self._handle = self._lib.hobbit_session_init(os.fsencode(path), low, c, error)
        if self._handle == self._ffi.NULL:
            raise self._refused(from_c(self._ffi, self._lib, error))
        info = self._new_struct("hobbit_model_info")
        self._check(self._lib.hobbit_session_info(self._handle, info, error), error)
        fields = _struct_fields(self._ffi, info)
        fields.update(has_low=bool(info.has_low), direct_io=bool(info.direct_io))
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

    def _check(self, status: int, error: Any) -> None:
        if status != self._lib.HOBBIT_OK:
            raise from_c(self._ffi, self._lib, error)

    def _alive(self) -> Any:
        if self._handle == self._ffi.NULL:
            raise StateError("the model is closed")
        if self._pid != os.getpid():
            raise StateError("the model was loaded before a fork, and its threads stayed in the parent: load it in this process")
        return self._handle

    def _ours(self) -> bool:
        """Whether there are threads to stop: not after close, and not in a child made by fork."""
        return self._handle != self._ffi.NULL and self._pid == os.getpid()

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
        needed = _memory.resident() + self.info.bytes_dense + self._pool_floor()
        return self._base_budget is None or needed + _SLACK <= self._base_budget

    def refuse_unloaded(self, context: int, extra: int) -> MemoryBudgetError:
        """The error for a budget that cannot work; `context`: of a model loaded without its weights (no_alloc)."""
        ctx = self._ffi.cast("void *", context)
        sizes = int(self._lib.hobbit_context_resident_bytes(ctx)) + int(self._lib.hobbit_context_compute_bytes(ctx))
        return self._refusal(_memory.resident() + sizes - self.info.bytes_high + extra)

    def _refusal(self, held: int) -> MemoryBudgetError:
        """`held`: what the process holds with everything but the expert pool."""
        smallest = int((held + self._pool_floor() + _SLACK) / (1 - _SLACK_SHARE)) + _ROUGHLY
        return MemoryBudgetError(
            f"a memory budget of {human(self._base_budget or 0)} is too small for {self.path}: it needs at least "
            f"{human(smallest)} (dense weights {human(self.info.bytes_dense)}, expert pool {human(self._pool_floor())}, the "
            "rest is the process itself, KV cache and buffers; a smaller n_ctx, n_batch or n_ubatch helps)"
        )

    def _pool_floor(self) -> int:
        wanted = self.params.expert_cache
        return self.info.pool_min if wanted is None else min(self._parse_pool(wanted), self.info.pool_max)

    def _parse_pool(self, size: Size) -> int:
        return _memory.parse_size(size, of=self.info.pool_max)

    def start(self, context: int, extra: int) -> None:
        """Makes the expert pool out of what the budget leaves, and starts the threads.

        Args:
            context: address of the llama_context.
            extra: bytes that the caller will come to use beside what it holds now.
        """
        ctx = self._ffi.cast("void *", context)
        held = _memory.resident() + int(self._lib.hobbit_context_compute_bytes(ctx)) + extra
        pool: Optional[int] = None
        if self.params.expert_cache is not None:
            pool = self._parse_pool(self.params.expert_cache)
        if self._base_budget is not None:
            budget = self._base_budget
            spare = budget - held - _SLACK - int(budget * _SLACK_SHARE)
            if spare < self._pool_floor():
                raise self._refusal(held)
            self.memory_budget = budget
            pool = spare if pool is None else pool
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
        stats = self.stats()
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
            self._resize(wanted)
            now = self.pool_bytes()
            self._whole_pool = now
            self.memory_budget += now - before

    def _yield_memory(self) -> None:
        """From now on the pool shrinks while memory is short, and grows again."""
        cycle = self.info.n_moe_layer * self.info.n_expert_used * self.info.slot_high
        self._whole_pool = self.pool_bytes()
        to_come = max(0, self.memory_budget - _memory.resident())
        yielding = Yielding(read_all(), to_come, max(self.info.pool_min, cycle))

        def resize(pool: int) -> None:
            with self._resizing:
                self._resize(pool)

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

    # ---- measuring ----

    def probe_read(self, low: bool, depth: int, seconds: float) -> Tuple[int, int, float]:
        """Reads expert slices at random places, `depth` at a time. Returns reads, bytes, seconds."""
        error, probe = self._ffi.new("hobbit_error *"), self._new_struct("hobbit_read_probe")
        self._check(self._lib.hobbit_probe_read(self._alive(), low, depth, seconds, probe, error), error)
        return int(probe.reads), int(probe.bytes), float(probe.seconds)

    # ---- running ----

    def set_thresholds(self, t1: float, t2: float) -> None:
        """Other T1, T2 from the next batch on."""
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_set_thresholds(self._alive(), t1, t2, error), error)
        self._thresholds = (t1, t2)

    def _served(self) -> Served:
        """As in `stats`."""
        c = self._stats()
        t = c.total
        return Served(
            tokens=int(c.n_tokens),
            n_bytes=int(t.bytes_demand + t.bytes_prefetch),
            selections=int(t.selections),
            low=int(t.hits_low + t.loads_low),
            skipped=int(t.skips),
        )

    def _stats(self) -> Any:
        error, c = self._ffi.new("hobbit_error *"), self._new_struct("hobbit_stats")
        self._check(self._lib.hobbit_session_stats(self._alive(), c, error), error)
        return c

    def begin_sequence(self) -> None:
        self._lib.hobbit_session_begin_sequence(self._alive())

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Around calls of llama_decode: times them, and turns a failed read into its exception."""
        handle = self._alive()
        begin = time.perf_counter()
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

    def stats(self) -> OffloadStats:
        handle, error = self._alive(), self._ffi.new("hobbit_error *")
        c = self._stats()
        layers = []
        for i in range(c.n_moe_layer):
            counts, block = self._ffi.new("hobbit_counts *"), self._ffi.new("uint32_t *")
            self._check(self._lib.hobbit_session_layer_stats(handle, i, counts, block, error), error)
            layers.append(LayerCounts(**_struct_fields(self._ffi, counts), block=int(block[0])))
        recall = {d + 1: c.predicted_right[d] / c.predicted[d] for d in range(len(c.predicted)) if c.predicted[d]}
        return OffloadStats(
            **_struct_fields(self._ffi, c.total),
            n_tokens=c.n_tokens,
            eval_seconds=self.eval_seconds,
            peak_memory=_memory.peak_resident(),
            memory_budget=self.memory_budget,
            pool_bytes=c.pool_bytes,
            slots_high=c.slots_high,
            slots_low=c.slots_low,
            prefetch_on=bool(c.prefetch_on),
            prefetch_ratio=c.prefetch_ratio or None,
            resident_high=c.resident_high,
            resident_low=c.resident_low,
            recall=recall,
            direct_io=bool(c.direct_io),
            layers=layers,
            thresholds=self._thresholds,
            warmed=int(c.warmed),
            bytes_warmed=int(c.bytes_warmed),
            pool_shrinks=self._monitor.shrinks if self._monitor is not None else 0,
            pool_grows=self._monitor.grows if self._monitor is not None else 0,
        )

    def expert_uses(self) -> Dict[str, Any]:
        """{"blocks": N of blk.N for each MoE layer, "uses": selections of each expert, "loads": those it was read for}."""
        handle, n = self._alive(), self.info.n_expert
        out: Dict[str, Any] = {"blocks": [layer.block for layer in self.stats().layers], "uses": [], "loads": []}
        for layer in range(self.info.n_moe_layer):
            uses, loads = self._ffi.new("uint64_t[]", n), self._ffi.new("uint64_t[]", n)
            found = int(self._lib.hobbit_session_expert_uses(handle, layer, uses, loads, n))
            out["uses"].append([int(u) for u in uses[0:found]])
            out["loads"].append([int(u) for u in loads[0:found]])
        return out

    def record(self) -> None:
        """From now on: the time line of a token, memory over time, every selection."""
        handle = self._alive()
        self._lib.hobbit_session_timeline(handle, True)
        self._lib.hobbit_session_trace(handle, True)
        self._recorded = _recording.MemorySamples()

    def recording(self) -> Dict[str, Any]:
        """What was recorded since; see `_recording.recording`."""
        if self._recorded is None:
            raise StateError("nothing was recorded")
        return _recording.recording(self, self._recorded)

    def timeline(self, slowest: bool) -> Any:
        """Events [kind, N of blk.N, begin, end, bytes] of the last token or of the slowest, seconds since it began."""
        handle = self._alive()
        n = int(self._lib.hobbit_session_timeline_read(handle, slowest, 0, self._ffi.NULL))
        events = self._ffi.new("hobbit_event[]", max(n, 1))
        n = min(n, int(self._lib.hobbit_session_timeline_read(handle, slowest, n, events)))
        kinds = _recording.EVENT_KINDS
        return [[kinds[e.kind], int(e.block), e.begin, e.end, int(e.bytes)] for e in events[0:n]]

    def reset_stats(self) -> None:
        self._lib.hobbit_session_reset_stats(self._alive())
        self.eval_seconds = 0.0

    def trace(self, on: bool, predictions: int = 0) -> None:
        """Starts recording the routing, anew, or ends it; with predictions up to so many layers ahead."""
        if on and predictions:
            error = self._ffi.new("hobbit_error *")
            self._check(self._lib.hobbit_session_trace_predictions(self._alive(), predictions, error), error)
        else:
            self._lib.hobbit_session_trace(self._alive(), on)

    def trace_read(self) -> Any:
        """(ids, weights) of the tokens since trace(True): uint16 and float32 arrays [tokens, MoE layers, k]."""
        import numpy as np

        handle = self._alive()
        n = int(self._lib.hobbit_session_trace_read(handle, 0, self._ffi.NULL, self._ffi.NULL))
        shape = (n, self.info.n_moe_layer, self.info.n_expert_used)
        ids, weights = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
        self._lib.hobbit_session_trace_read(
            handle, n, self._ffi.from_buffer("uint16_t[]", ids), self._ffi.from_buffer("float[]", weights)
        )
        return ids, weights

    def trace_read_predictions(self, depth: int) -> Any:
        """The same of the predictions, [tokens, MoE layers, depth, m]; `depth` as given to trace()."""
        import numpy as np

        handle = self._alive()
        n = int(self._lib.hobbit_session_trace_read_predictions(handle, 0, self._ffi.NULL, self._ffi.NULL))
        shape = (n, self.info.n_moe_layer, depth, int(self._lib.hobbit_session_n_predicted(handle)))
        ids, weights = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
        self._lib.hobbit_session_trace_read_predictions(
            handle, n, self._ffi.from_buffer("uint16_t[]", ids), self._ffi.from_buffer("float[]", weights)
        )
        return ids, weights

    def set_routing(self, trace: Optional[Trace]) -> None:
        """From the next batch on the routing of `trace` instead of the model's own; None: its own again."""
        routing, keep = c_routing(self._ffi, trace)
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_set_routing(self._alive(), routing, error), error)
        del keep  # copied

    # ---- importance ----

    def collect_inputs(self, on: bool) -> None:
        """Starts collecting what `inputs` gives, from zero, or ends it and frees the memory. Not while a batch is computed."""
        error = self._ffi.new("hobbit_error *")
        self._check(self._lib.hobbit_session_collect_inputs(self._alive(), on, error), error)

    def inputs(self) -> Iterator[Tuple[str, Any, Any]]:
        """For each expert tensor its name, the sums of the squares of its inputs, float32 [experts, columns], and their numbers,
        uint64 [experts]. Views of what goes on changing; of nothing while `collect_inputs` is off.
        """
        import numpy as np

        buffer, null = self._ffi.buffer, self._ffi.NULL
        for c in self._input_structs():
            n, n_in = (int(c.n_expert), int(c.n_in)) if c.sums != null else (0, int(c.n_in))
            sums = np.frombuffer(buffer(c.sums, 4 * n * n_in), np.float32) if n else np.empty(0, np.float32)
            counts = np.frombuffer(buffer(c.counts, 8 * n), np.uint64) if n else np.empty(0, np.uint64)
            yield self._ffi.string(c.name).decode(), sums.reshape(n, n_in), counts

    def inputs_bytes(self) -> int:
        """Memory that `collect_inputs` takes."""
        return sum(int(c.n_expert) * (4 * int(c.n_in) + 8) for c in self._input_structs())

    def _input_structs(self) -> Iterator[Any]:
        handle, c = self._alive(), self._new_struct("hobbit_inputs")
        for layer in range(self.info.n_moe_layer):
            part = 0
            while self._lib.hobbit_session_inputs(handle, layer, part, c):
                yield c
                part += 1

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
    ffi, lib = _lib.core()
    error, text = ffi.new("hobbit_error *"), ffi.new("char[128]")
    if lib.hobbit_fingerprint(os.fsencode(path), text, len(text), error) != lib.HOBBIT_OK:
        raise from_c(ffi, lib, error)
    out: str = ffi.string(text).decode()
    return out
