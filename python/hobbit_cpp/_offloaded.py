"""What `Llama` has beside llama-cpp-python's class once its experts are offloaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Dict, Optional, Union

from ._calls import Calls
from ._handle import ModelInfo
from ._memory import Size
from ._session import Session
from .errors import StateError
from .stats import OffloadStats

if TYPE_CHECKING:
    from .trace import Trace


class OffloadMethods:
    """For a class that sets these two."""

    _session: Optional[Session]
    _calls: Calls

    @property
    def offloaded(self) -> bool:
        """Whether experts of this model are offloaded: False with offload=None, and for a dense model."""
        return self._session is not None

    def _offloaded(self) -> Session:
        if self._session is None:
            raise StateError("this model is not offloaded: it is dense, or was loaded with offload=None")
        return self._session

    @property
    def offload_info(self) -> ModelInfo:
        """What the file holds: layers, experts, sizes."""
        return self._offloaded().info

    def offload_stats(self) -> OffloadStats:
        """What the offload did since the model was loaded or the statistics were reset.

        Raises:
            StateError: not offloaded, or closed.
        """
        with self._calls.gate:
            return self._offloaded().stats()

    def expert_uses(self) -> Dict[str, Any]:
        """How often each expert was selected, and read for it, since the model was loaded or the statistics were reset:
        lists by MoE layer, "blocks" (N of blk.N), "uses" and "loads".
        """
        with self._calls.gate:
            return self._offloaded().expert_uses()

    def start_recording(self) -> None:
        """Records what `hobbit report` draws: time line of a token, memory over time, reuse of experts. Costs little."""
        with self._calls.gate:
            self._offloaded().record()

    def recording(self) -> Dict[str, Any]:
        """What was recorded: "timeline", "memory", "reuse", as in the README.

        Raises:
            StateError: `start_recording` was not called.
        """
        with self._calls.gate:
            return self._offloaded().recording()

    def reset_offload_stats(self) -> None:
        """All counts go to zero; the cache keeps its contents."""
        with self._calls.gate:
            self._offloaded().reset_stats()

    def resize_expert_cache(self, size: Size) -> None:
        """Gives the expert pool another size; from any thread, also while the model computes.

        A smaller pool gives its memory back to the system at once, but for the experts in use at the moment, which go at the
        next tokens; a larger one fills as experts are read. `memory_budget` in the statistics follows. Logits of exact mode
        stay as they are; where what is computed depends on what is cached, they do not.

        Args:
            size: as `expert_cache`: bytes, "2GiB", or "50%" of the pool that holds every expert. More than that is cut to it.

        Raises:
            ParameterError: not a size.
            MemoryBudgetError: below `offload_info.pool_min`, or more than is free: it is as before.
            OutOfMemoryError: the system refused the memory: it is as before.
            UnsupportedModelError: eviction="layer-lru", "layer-arc" or "fate", where each layer has slots of its own.
            StateError: not offloaded, or closed.

        Example:
            >>> llm.resize_expert_cache("2GiB")
        """
        with self._calls.gate:
            session = self._offloaded()
        session.resize_expert_cache(size)  # not under the gate, which whoever cancels would wait for

    def set_routing(self, trace: Union[Trace, str, os.PathLike[str], None]) -> None:
        """Lets the model follow a recorded routing instead of its routers, so that random weights run like real ones.

        From the next token on each token takes the next row of the trace, from the first one on: its experts, their weights,
        and its predictions, if it has any (without them nothing is prefetched). Rows and layers are taken modulo. None ends it.

        Args:
            trace: a `hobbit_cpp.trace.Trace` or the file of one.

        Raises:
            TraceFormatError: the file is not a trace.
            ParameterError: the trace's k is not the model's, or it names an expert that the model does not have.
            StateError: not offloaded, or closed.

        Example:
            >>> llm.set_routing("deepseek-v2-lite.npz")
        """
        from .trace import Trace

        if isinstance(trace, (str, os.PathLike)):
            trace = Trace.load(trace)
        with self._calls.alone():
            self._offloaded().set_routing(trace)
