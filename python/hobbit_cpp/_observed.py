"""What a session tells of itself: counters, time lines, routing, importance."""

from __future__ import annotations

import itertools
from typing import Any, Dict, Iterator, Optional, Tuple

from . import _memory, _recording
from ._handle import Handle, struct_fields
from ._lib import call
from ._pressure import Monitor
from .errors import StateError
from .params import OffloadParams
from .stats import LayerCounts, OffloadStats, Served


class Observed(Handle):
    """A session that can be looked at."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self.eval_seconds = 0.0
        self.memory_budget = 0
        self._monitor: Optional[Monitor] = None
        self._recorded: Optional[_recording.MemorySamples] = None
        self._thresholds = None if params.t1 is None or params.t2 is None or params.exact else (params.t1, params.t2)
        super().__init__(path, params)

    def probe_read(self, low: bool, depth: int, seconds: float) -> Tuple[int, int, float]:
        """Reads expert slices at random places, `depth` at a time. Returns reads, bytes, seconds."""
        probe = self._new_struct("hobbit_read_probe")
        call(self._lib.hobbit_probe_read, self._alive(), low, depth, seconds, probe)
        return int(probe.reads), int(probe.bytes), float(probe.seconds)

    def _stats(self) -> Any:
        c = self._new_struct("hobbit_stats")
        call(self._lib.hobbit_session_stats, self._alive(), c)
        return c

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
            cost_asked=float(t.cost_asked),
            cost_low=float(t.cost_low),
        )

    def stats(self) -> OffloadStats:
        handle = self._alive()
        c = self._stats()
        layers = []
        for i in range(c.n_moe_layer):
            counts, block = self._ffi.new("hobbit_counts *"), self._ffi.new("uint32_t *")
            call(self._lib.hobbit_session_layer_stats, handle, i, counts, block)
            layers.append(LayerCounts(**struct_fields(self._ffi, counts), block=int(block[0])))
        recall = {d + 1: c.predicted_right[d] / c.predicted[d] for d in range(len(c.predicted)) if c.predicted[d]}
        return OffloadStats(
            **struct_fields(self._ffi, c.total),
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

    def reset_stats(self) -> None:
        self._lib.hobbit_session_reset_stats(self._alive())
        self.eval_seconds = 0.0

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
        self._lib.hobbit_session_timeline(self._alive(), True)
        self.trace(True, max_tokens=_recording.MAX_TOKENS)
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

    def trace(self, on: bool, predictions: int = 0, max_tokens: int = 2**64 - 1) -> None:
        """Starts recording the routing of so many tokens, anew, or ends it; with predictions up to so many layers ahead."""
        call(self._lib.hobbit_session_trace, self._alive(), on, predictions, max_tokens)

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

    def collect_inputs(self, on: bool, rows: bool = False) -> None:
        """Starts collecting what `inputs` gives, from zero, or ends it and frees the memory. Not while a batch is computed.

        Args:
            rows: what `input_rows` gives as well.
        """
        call(self._lib.hobbit_session_collect_inputs, self._alive(), on, rows)

    def inputs(self) -> Iterator[Tuple[str, Any, Any]]:
        """For each expert tensor its name, the sums of the squares of its inputs, float32 [experts, columns], and their numbers,
        uint64 [experts]. Views of what goes on changing; of nothing while `collect_inputs` is off.
        """
        import numpy as np

        buffer, null = self._ffi.buffer, self._ffi.NULL
        for _, c in self._input_structs():
            n, n_in = (int(c.n_expert), int(c.n_in)) if c.sums != null else (0, int(c.n_in))
            sums = np.frombuffer(buffer(c.sums, 4 * n * n_in), np.float32) if n else np.empty(0, np.float32)
            counts = np.frombuffer(buffer(c.counts, 8 * n), np.uint64) if n else np.empty(0, np.uint64)
            yield self._ffi.string(c.name).decode(), sums.reshape(n, n_in), counts

    def input_rows(self) -> Iterator[Tuple[int, Tuple[str, ...], Any, Any]]:
        """The inputs of the last llama_decode, of each MoE layer where all experts of a token see the same (up and gate).

        The layer, the names of the expert tensors, float16 [tokens, columns], and uint16 [tokens, k], the experts that each was
        given to. Views of what the next llama_decode overwrites.
        """
        import numpy as np

        structs = ((layer, c) for layer, c in self._input_structs() if c.rows != self._ffi.NULL and c.n_rows > 0)
        for layer, of_layer in itertools.groupby(structs, lambda of: of[0]):
            names = []
            for _, c in of_layer:  # one struct, filled again and again
                names.append(self._ffi.string(c.name).decode())
                n = int(c.n_rows)
                rows = np.frombuffer(self._ffi.buffer(c.rows, 2 * n * c.n_in), np.float16).reshape(n, c.n_in)
                selected = np.frombuffer(self._ffi.buffer(c.selected, 2 * n * c.k), np.uint16).reshape(n, c.k)
            yield layer, tuple(names), rows, selected

    def inputs_bytes(self, rows: int = 0) -> int:
        """Memory that `collect_inputs` takes, with the rows of batches of so many tokens."""
        sums = 0
        widest: Dict[int, int] = {}  # the experts chosen are next to nothing beside the rows
        for layer, c in self._input_structs():
            sums += int(c.n_expert) * (4 * int(c.n_in) + 8)
            widest[layer] = max(widest.get(layer, 0), int(c.n_in))
        return sums + 2 * rows * sum(widest.values())

    def _input_structs(self) -> Iterator[Tuple[int, Any]]:
        handle, c = self._alive(), self._new_struct("hobbit_inputs")
        for layer in range(self.info.n_moe_layer):
            part = 0
            while self._lib.hobbit_session_inputs(handle, layer, part, c):
                yield layer, c
                part += 1
