"""Fills the new file: a few threads, each with one chunk of rows in hand, write at the places the plan gave.

A chunk of an expert tensor is read and turned into floats once for both precisions. No thread ever holds more than its
chunk, and neither what was read nor what was written stays in the page cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .layout import FileLayout
from .plan import Output, Tensor
from .quantise import Bytes, Floats, Quantiser
from .source import Sources

__all__ = ["CHUNK_ELEMENTS", "Chunk", "work", "write_data", "write_fully"]

# Elements of a chunk: 4 MiB as floats. Enough for a disk's full rate, and little memory.
CHUNK_ELEMENTS = 1 << 20
# Bytes written between two calls of fdatasync, which bound the dirty pages.
_SYNC_BYTES = 256 << 20
_POLL_SECONDS = 0.2


class WritableFile(Protocol):
    """An open file and what goes into it."""

    @property
    def fd(self) -> int: ...

    @property
    def layout(self) -> FileLayout: ...


@dataclass(frozen=True)
class Chunk:
    """Some rows of a source tensor and all that is made of them."""

    source: Tensor
    first_row: int
    n_rows: int
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.source.name}, rows from {self.first_row}"

    @property
    def n_bytes(self) -> int:
        """Bytes to read."""
        return self.n_rows * self.source.type.row_bytes(self.source.row)


def work(
    all_outputs: Iterable[Output], group: Callable[[Tensor], Hashable | None] = lambda _: None
) -> Iterator[tuple[Chunk, ...]]:
    """The work, in the order of the new file, in what one thread does at a time; high and low copies of the same rows together.

    Args:
        group: the tensors for which it gives the same are gone through side by side, an expert of all of them at a time, so that
            no thread waits for what another works out for an expert. None: a tensor for itself, a chunk at a time.
    """
    by_source: dict[Tensor, list[Output]] = {}
    for output in all_outputs:
        by_source.setdefault(output.source, []).append(output)
    groups: dict[Hashable, list[Tensor]] = {}
    for source in by_source:
        key = group(source)
        groups.setdefault(source if key is None else key, []).append(source)
    for key, sources in groups.items():
        first = sources[0]
        if key is first:
            yield from ((chunk,) for chunk in _chunks(first, 0, first.n_rows, by_source[first]))
        else:
            for expert in range(first.shape[2]):
                yield tuple(
                    chunk for one in sources for chunk in _chunks(one, expert * one.shape[1], one.shape[1], by_source[one])
                )


def _chunks(source: Tensor, first: int, n_rows: int, outputs: Sequence[Output]) -> Iterator[Chunk]:
    step = max(1, CHUNK_ELEMENTS // source.row)
    for row in range(first, first + n_rows, step):
        yield Chunk(source, row, min(step, first + n_rows - row), tuple(outputs))


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """pwrite until all is written."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


class _Worker:
    """The buffers of one thread, and what it does with a chunk."""

    def __init__(self, source: Sources, quantiser: Quantiser, files: Sequence[WritableFile]) -> None:
        self._source, self._quantiser, self._files = source, quantiser, files
        self._read: Bytes = np.empty(0, np.uint8)
        self._made: Bytes = np.empty(0, np.uint8)
        self._floats: Floats = np.empty(0, np.float32)

    def run(self, chunk: Chunk) -> int:
        """Converts a chunk; the bytes written."""
        source = chunk.source
        if self._read.size < chunk.n_bytes:
            self._read = np.empty(chunk.n_bytes, np.uint8)
        data = self._read[: chunk.n_bytes]
        place = source.offset + chunk.first_row * source.type.row_bytes(source.row)
        self._source.read(source.part, place, data.data)
        floats = None
        written = 0
        for output in chunk.outputs:
            made = data
            if output.type is not source.type:
                if floats is None:
                    floats = self._to_float(chunk, data)
                made = self._quantise(output, floats, chunk)
            file = self._files[output.file]
            offset = file.layout.data_offset + output.offset + chunk.first_row * output.type.row_bytes(source.row)
            write_fully(file.fd, made.data, offset)
            written += made.size
        return written

    def _to_float(self, chunk: Chunk, data: Bytes) -> Floats:
        n = chunk.n_rows * chunk.source.row
        if self._floats.size < n:
            self._floats = np.empty(n, np.float32)
        floats = self._floats[:n]
        self._quantiser.to_float(chunk.source.type, data, floats, chunk.name)
        return floats

    def _quantise(self, output: Output, floats: Floats, chunk: Chunk) -> Bytes:
        row = output.source.row
        n = floats.size // row * output.type.row_bytes(row)
        if self._made.size < n:
            self._made = np.empty(n, np.uint8)
        made = self._made[:n]
        self._quantiser.quantise_rows(output.type, floats, made, chunk.source, chunk.first_row)
        return made


def write_data(
    source: Sources, files: Sequence[WritableFile], quantiser: Quantiser, threads: int, progress: Callable[[int], None]
) -> None:
    """Writes the data of all tensors. On an exception (Ctrl-C too) all threads have stopped when it comes out.

    Args:
        progress: called with the bytes of the source that are done.
    """
    outputs = [o for file in files for o in file.layout.outputs]
    for kind in {o.type.id: o.type for o in outputs if o.type is not o.source.type}.values():
        quantiser.prepare(kind)
    items = work(outputs, quantiser.group)
    lock = threading.Lock()
    stop = threading.Event()
    read = written = synced = 0

    def worker() -> None:
        nonlocal read, written
        hands = _Worker(source, quantiser, files)
        while not stop.is_set():
            with lock:
                item = next(items, None)
            if item is None:
                return
            for chunk in item:
                if stop.is_set():
                    return
                n = hands.run(chunk)
                with lock:
                    read += chunk.n_bytes
                    written += n

    with ThreadPoolExecutor(threads, thread_name_prefix="hobbit-convert") as pool:
        futures = [pool.submit(worker) for _ in range(threads)]
        try:
            pending: Sequence[object] = futures
            while pending:
                done, not_done = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                pending = list(not_done)
                progress(read)
                if written - synced >= _SYNC_BYTES:
                    synced = written
                    for file in files:
                        flush(file.fd)
        finally:
            stop.set()
            interrupted = False
            while not all(future.done() for future in futures):  # or they would write to what their files' numbers are next
                try:
                    wait(futures)
                except KeyboardInterrupt:
                    interrupted = True
            if interrupted:
                raise KeyboardInterrupt
    progress(read)
    for file in files:
        flush(file.fd)


def flush(fd: int) -> None:
    """Makes what was written durable and drops it from the page cache."""
    os.fsync(fd)
    drop_cached(fd)


def drop_cached(fd: int) -> None:
    """Nothing of the file stays in the page cache, where the system can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
