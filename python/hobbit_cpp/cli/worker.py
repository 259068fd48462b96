"""The model works in a thread of its own, so that Ctrl-C is heard while llama.cpp computes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")

# How often the main thread looks up: cancels again what was not yet running when Ctrl-C came, and shows progress.
_TICK_SECONDS = 0.1
_END: Any = object()


class Worker:
    """One thread. The main thread waits for it and, after Ctrl-C, until it has really ended.

    Inside `stoppable`, Ctrl-C raises nothing by itself: no line of Python is left half done, and the model is never in use
    when the caller goes on. `do` and `each` raise KeyboardInterrupt once their work has ended.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hobbit-model")
        self._stopped = False
        self._cancel: Callable[[], object] = lambda: None

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()

    @contextlib.contextmanager
    def stoppable(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Ctrl-C stops the work inside. `cancel`: makes the present work end soon; called from the main thread, more than
        once, also when there is nothing to cancel."""
        self._stopped = False
        self._cancel = cancel
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell does for what it starts with &
        if ignored or threading.current_thread() is not threading.main_thread():
            yield  # other threads hear no signals
            return
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, *_: object) -> None:
        self._stopped = True

    def do(self, work: Callable[[], T], tick: Callable[[], object] = lambda: None) -> T:
        """The result of `work`; `tick` is called now and then meanwhile, in the calling thread.

        Raises:
            KeyboardInterrupt: Ctrl-C came. The work has ended, and what came of it is dropped.
        """
        future: Future[T] = self._pool.submit(work)
        try:
            while not wait([future], _TICK_SECONDS).done:
                if self._stopped:
                    self._cancel()
                else:
                    tick()
        except BaseException:
            # not from a signal: from `tick`, say a terminal that went away. The model must be at rest nevertheless
            while not wait([future], _TICK_SECONDS).done:
                self._cancel()
            raise
        if self._stopped:
            raise KeyboardInterrupt from future.exception()
        return future.result()

    def each(self, items: Iterator[T], tick: Callable[[], object] = lambda: None) -> Iterator[T]:
        """The items, each made in the thread; nothing is made while the caller looks at one."""
        try:
            while True:
                item = self.do(lambda: next(items, _END), tick)
                if item is _END:
                    return
                yield item
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
