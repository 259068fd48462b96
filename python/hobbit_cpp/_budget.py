"""What the process of a model may take, and how that is divided between experts and the batch at hand."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from typing import Optional, Tuple

from . import _memory
from ._batches import SMALL, BatchRoom
from ._lib import call
from ._memory import Size, human
from ._observed import Observed
from ._pressure import Monitor, Yielding, read_all
from .errors import MemoryBudgetError, OutOfMemoryError
from .params import OffloadParams

__all__ = ["ROUGHLY", "SLACK", "SLACK_SHARE", "Budgeted", "everything_fits"]

# What llama.cpp, ggml's work buffer, samplers and Python take beyond what can be counted before it is used.
SLACK = 24 << 20
SLACK_SHARE = 0.01
# Embeddings of fewer bytes are not worth a read for a token.
_FEW_EMBEDDINGS = 16 << 20
# By which two starts of the same process differ.
ROUGHLY = 4 << 20


def everything_fits(budget: int, everything: int) -> bool:
    """Process, weights and the whole pool, and a tenth of that for KV cache and buffers, whose size is not known yet."""
    return budget >= 1.1 * everything


class Budgeted(Observed):
    """A session with a budget: fixed by `plan` before the model is loaded, divided by `_divide` when what it took is known."""

    def __init__(self, path: str, params: OffloadParams) -> None:
        self._base_budget: Optional[int] = None
        # Held while the pool changes, which takes seconds where it grows by gigabytes: then it cannot be freed. Re-entrant, since
        # a signal handler may close the model.
        self._resizing = threading.RLock()
        _all.add(self)
        self._whole_pool = 0  # its size when nothing had to be given back, beside the batch at hand
        self._room: Optional[BatchRoom] = None
        self.n_outputs = 1  # tokens of a batch whose logits are asked for; of more, buffers take what no budget knows of
        self._context = self._least = 0
        self._at_load = 0  # what is held while the model is loaded, before there is a pool
        self._given_back = 0  # of it, because memory is short: see _yield_memory
        self._lent = 0  # of it, for what is no batch: see lend
        self.embeddings_on_disk = False
        super().__init__(path, params)

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
        held = _memory.resident() + self.bytes_dense
        self._at_load = held + self.info.bytes_parsed
        needed = max(held + self._pool_floor(), self._at_load)
        return self._base_budget is None or needed + SLACK <= self._base_budget

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

    @property
    def embeddings_may_leave(self) -> bool:
        """They are in memory, and it was ours to decide."""
        return not self.embeddings_on_disk and self.bytes_embeddings > 0 and self.params.embeddings_on_disk is None

    def embeddings_leave(self, budget: Optional[int], process: int) -> bool:
        """Whether they stay on disk: where not everything has a place.

        Args:
            budget: None: of experts alone.
            process: what it holds without the model.
        """
        pool = self.info.pool_max if self.params.expert_cache is None else self._pool_floor()
        held = process + self.info.bytes_dense
        short = budget is not None and (
            not everything_fits(budget, held + pool) or held + self.info.bytes_parsed + SLACK > budget
        )
        return self.bytes_embeddings > 0 and (short or self.params.embeddings_on_disk is True)

    def refuse_unloaded(self, context: int, extra: int, n_least: int) -> MemoryBudgetError:
        """The error for a budget that cannot work; `context`: of a model loaded without its weights (no_alloc)."""
        ctx = self._ffi.cast("void *", context)
        sizes = int(self._lib.hobbit_context_resident_bytes(ctx)) + sum(self.fit_batches(context, n_least))
        on_disk = self.info.bytes_high + self.info.bytes_dense - self.bytes_dense
        return self._refusal(_memory.resident() + sizes - on_disk + self.info.bytes_tables + extra)

    def fit_batches(self, context: int, n_tokens: int) -> Tuple[int, int]:
        """hobbit_context_fit: bytes of compute buffers for batches of so many tokens, and of what ggml works in."""
        buffers, work = self._ffi.new("uint64_t *"), self._ffi.new("uint64_t *")
        ctx = self._ffi.cast("void *", context)
        call(self._lib.hobbit_context_fit, ctx, n_tokens, self.n_outputs, buffers, work)
        return int(buffers[0]), int(work[0])

    def _refusal(self, held: int) -> MemoryBudgetError:
        """`held`: what the process holds with everything but the expert pool."""
        most = max(held + self._pool_floor(), self._at_load)
        smallest = int((most + SLACK) / (1 - SLACK_SHARE)) + ROUGHLY
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
        return self.params.expert_cache is None and self.info.can_resize

    def _divide(self, context: int, extra: int, n_ubatch: int, n_least: int, lends: bool) -> int:
        """Bytes of the pool out of what the budget leaves; the arguments are those of `start`.

        Raises:
            MemoryBudgetError: it is too small; or `embeddings_may_leave`, and have to.
        """
        self._context = context
        held = _memory.resident() + self.info.bytes_tables + extra
        most = self.fit_batches(context, n_ubatch)
        taken = sum(most)
        pool: Optional[int] = None
        if self.params.expert_cache is not None:
            pool = self._parse_pool(self.params.expert_cache)
        if self._base_budget is not None:
            budget = self.memory_budget = self._base_budget
            spare = budget - held - SLACK - int(budget * SLACK_SHARE)
            # Where every expert has a place beside the largest batch nothing needs to be lent.
            if lends and spare - taken < self.info.pool_max:
                self._least = taken = sum(self.fit_batches(context, n_least))
                small = self.fit_batches(context, SMALL)
                self._room = BatchRoom(n_ubatch, most, small, spare, self.info.pool_min, self.info.pool_max)
                pool = self._room.pool
            if spare - taken < self._pool_floor():
                raise self._refusal(held + taken)
            pool = spare - taken if pool is None else pool
            # Decided when the KV cache and the buffers were not known: not everything has a place after all.
            if self.params.expert_cache is None and pool < self.info.pool_max and self.embeddings_may_leave:
                raise self._refusal(held + taken)
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
            self.memory_budget = held + pool + SLACK
        return pool

    # ---- while it runs ----

    def close(self) -> None:
        with self._resizing:
            super().close()

    def resize_expert_cache(self, size: Size) -> None:
        """See `Llama.resize_expert_cache`."""
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
            self._given_back = self._lent = 0

    def _yield_memory(self) -> None:
        """From now on the pool shrinks while memory is short, and grows again."""
        cycle = self.info.n_moe_layer * self.info.n_expert_used * self.info.slot_high
        to_come = max(0, self.memory_budget - _memory.resident())
        yielding = Yielding(read_all(), to_come, max(self.info.pool_min, cycle))

        def resize(pool: int) -> None:
            # Whoever resizes may be interrupted by a signal handler that closes the model, and with it waits for this thread.
            while not self._resizing.acquire(timeout=0.1):
                if self._monitor is None or self._monitor.ending:
                    return
            try:
                # What was whole when it was decided may be lent by now.
                self._given_back = max(0, self._whole_pool - self._lent - pool)
                self._follow()
            finally:
                self._resizing.release()

        self._monitor = Monitor(self.pool_bytes, lambda: self._whole_pool - self._lent, resize, yielding)

    def lend(self, n_bytes: int) -> None:
        """From now on the process takes so much more: the pool lends what the budget has not left, and has it back with 0.

        Raises:
            MemoryBudgetError: it has not as much; nothing was lent.
        """
        if n_bytes == 0 and self._lent == 0:
            return
        _memory.give_back()  # of the last time, or it would be counted as taken
        with self._resizing:
            left = self.memory_budget - _memory.resident() - self._lent - ROUGHLY  # with the whole pool
            most = max(0, self._whole_pool - self.info.pool_min) if self.lends() else 0
            missing = max(0, n_bytes - max(0, left))
            if missing > most and self._base_budget is not None:
                self._lent = 0
                self._try_to_follow()
                raise MemoryBudgetError(
                    f"llama.cpp takes some {human(n_bytes)} to sample by a grammar (JSON, tools) with this vocabulary, and a "
                    f"memory budget of {human(self.memory_budget)} has no room for them: it needs {human(missing - most)} more"
                )
            self._lent = min(missing, most)
            self._try_to_follow()

    def _follow(self) -> None:
        """The pool becomes what is left of it."""
        wanted = self._whole_pool - self._given_back - self._lent
        self._resize(max(wanted, self.info.pool_min))
        if self._given_back == 0 and wanted >= self.info.pool_min:
            self._whole_pool = self.pool_bytes() + self._lent  # a number of slots

    def _try_to_follow(self) -> None:
        with contextlib.suppress(MemoryBudgetError, OutOfMemoryError):  # nothing to grow into: the monitor tries again
            self._follow()

    def _resize(self, pool: int) -> None:
        call(self._lib.hobbit_session_resize, self._alive(), pool)

    def pool_bytes(self) -> int:
        """What the expert pool may take now."""
        return int(self._stats().pool_bytes)

    def largest_batch(self, wanted: int) -> int:
        """Of so many tokens, those that one llama_decode has memory for."""
        return wanted if self._room is None else self._room.largest(wanted, self._given_back + self._lent)

    def _make_room(self, n_tokens: int) -> None:
        """Before a batch: it borrows its buffers from the pool, or what an earlier one has borrowed goes back."""
        with self._resizing:  # resize_expert_cache may give another room at the same time
            room = self._room
            n = None if room is None else room.to_lay_out(n_tokens)
            if room is None or n is None:
                return
            room.laid_out(n, self.fit_batches(self._context, n))
            self._whole_pool = room.pool
            self._try_to_follow()


_all: weakref.WeakSet[Budgeted] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child made by fork: whoever held the lock stayed in the parent."""
    for session in list(_all):
        session._resizing = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
