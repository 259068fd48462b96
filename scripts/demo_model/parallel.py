"""Threads over blocks of rows, with the same sums whatever the number of cores.

The BLAS itself is held to one thread (see ``__init__.py``): its own threads
leave all element-wise work on one core, and spin at barriers on a busy machine.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Callable, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .transformer import FloatArray

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Rows of a block; fixed, because the order of the sums depends on it.
BLOCK = 2048

_POOL = ThreadPoolExecutor(os.cpu_count() or 1)


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results of ``work`` in the order of ``items``. Do not nest."""
    return list(_POOL.map(work, items))


def blocks(n: int) -> list[slice]:
    """Row slices that cover ``n`` rows."""
    return [slice(lo, min(lo + BLOCK, n)) for lo in range(0, n, BLOCK)]


def times(a: FloatArray, b: FloatArray) -> FloatArray:
    """``a @ b`` for a tall ``a``, (rows, n) and (n, m)."""
    out = np.empty((len(a), b.shape[1]), dtype=np.float32)

    def work(part: slice) -> None:
        np.matmul(a[part], b, out=out[part])

    each(work, blocks(len(a)))
    return out


def cross(a: FloatArray, b: FloatArray) -> FloatArray:
    """``a.T @ b`` for tall matrices, (rows, n) and (rows, m)."""
    total = np.zeros((a.shape[1], b.shape[1]), dtype=np.float32)
    for part in each(lambda rows: a[rows].T @ b[rows], blocks(len(a))):
        total += part
    return total
