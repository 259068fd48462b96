"""Calls on one model: one computes at a time, and any thread may cancel it.

llama.cpp's contexts are not made for several threads, and a context holds one text. So a call waits until the one that
computes is done. Between two chunks of a stream other calls may come in; then the stream is over, and says so.

The *current call* is the one that the text in the context belongs to. It lasts from its begin to its end; for a stream that is
until the generator is exhausted, closed, dropped, or superseded. `cancel` marks the current call, never one that comes later.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, Callable, Iterator, Optional

from .errors import EvaluationCancelled, StateError


class Owner:
    """On whose behalf calls are made, for `Calls.cancel`: a request that may be withdrawn. See OWNER."""

    def __init__(self) -> None:
        self.cancelled = False


# Set by a server around the work on a request; threads that are given a copy of the context have it too.
OWNER: ContextVar[Optional[Owner]] = ContextVar("hobbit_owner", default=None)


class Call:
    """One call of the user: `cancelled` is set once, by any thread."""

    def __init__(self) -> None:
        self.owner = OWNER.get()
        self.cancelled = False


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    bound = method()
    if bound is not None:
        bound()


class Calls:
    """
    Args:
        stop: method called by `cancel` to stop what is being computed; from any thread.
        clear: method that takes back what `stop` did, before the next call.
    """

    def __init__(self, stop: Callable[[], None], clear: Callable[[], None]) -> None:
        # Methods of the model that holds this object: weakly, so that the last reference to a model frees it at once.
        self._stop = weakref.WeakMethod(stop)
        self._clear = weakref.WeakMethod(clear)
        self._closing = False  # nothing begins any more
        self._closed = False  # nothing may be used any more
        self._make_locks()
        _all.add(self)

    def _make_locks(self) -> None:
        # Held while something is computed.
        self._lock = threading.RLock()
        # Guards _current and its flag, and keeps the model from being freed while another thread talks to it. Held for moments;
        # re-entrant, since signal handlers and finalizers may come in at any point.
        self.gate = threading.RLock()
        self._depth = 0  # of calls within calls; belongs to the holder of _lock
        self._current: Optional[Call] = None
        self._free: Optional[Callable[[], None]] = None  # at the end of the call that this thread is in

    def _set_current(self, call: Optional[Call]) -> None:
        with self.gate:
            before, self._current = self._current, call
            if before is not None and before is not call and before.cancelled:
                _call(self._clear)
            if call is not None and call.owner is not None and call.owner.cancelled:
                self.cancel()

    def _end(self, call: Call) -> None:
        with self.gate:
            if self._current is call:
                self._set_current(None)

    def cancel(self, owner: Optional[Owner] = None) -> None:
        """Cancels the current call; nothing when there is none. With an owner: all calls of this owner, present and future."""
        with self.gate:
            if owner is not None:
                owner.cancelled = True
            call = self._current
            if call is not None and not call.cancelled and (owner is None or call.owner is owner):
                call.cancelled = True
                _call(self._stop)

    def check(self) -> None:
        """Raises EvaluationCancelled when the current call was cancelled."""
        call = self._current
        if call is not None and call.cancelled:
            raise EvaluationCancelled("the evaluation was cancelled")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other threads out. Does not begin a call: for what leaves the text in the context as it is."""
        with self._lock:
            if self._closing and self._depth == 0:
                raise StateError("the model is closed")
            self.check_open()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._free is not None:
                    free, self._free = self._free, None
                    self._set_current(None)
                    free()

    def check_open(self) -> None:
        if self._closed:
            raise StateError("the model is closed")

    def close(self, free: Callable[[], None]) -> None:
        """Cancels the current call, waits for its end, and calls `free`; no call begins any more.

        From inside of a call (a signal handler, a callback of it) there is no waiting: its end calls `free`.
        """
        self._closing = True
        self.cancel()
        with self._lock:
            self._closed = True
            if self._depth > 0:
                self._free = free
                return
            self._set_current(None)
            free()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A call, or a part of the one that this thread is in."""
        with self.alone():
            if self._depth > 1:
                yield
                return
            call = Call()
            self._set_current(call)
            try:
                yield
            finally:
                self._end(call)

    def stream(self, inner: Iterator[Any]) -> Generator[Any, Any, Any]:
        """The generator `inner` as a call: computing while it is resumed, and at most as long as no other call has begun."""
        assert isinstance(inner, Generator)
        call: Optional[Call] = None
        sent: Any = None
        try:
            while True:
                with self.alone():
                    if self._depth == 1:
                        if call is None:
                            call = Call()
                            self._set_current(call)
                        elif self._current is not call:
                            raise StateError(
                                "another call has used this model since, and a model holds one text at a time: finish a stream "
                                "before the next call, or load the model twice"
                            )
                        self.check()
                    try:
                        item = inner.send(sent)
                    except StopIteration:
                        return
                sent = yield item
        finally:
            inner.close()
            if call is not None:
                self._end(call)


_all: weakref.WeakSet[Calls] = weakref.WeakSet()


def _after_fork() -> None:
    """In a child made by fork: whoever held the locks stayed in the parent."""
    for calls in list(_all):
        calls._make_locks()


os.register_at_fork(after_in_child=_after_fork)
