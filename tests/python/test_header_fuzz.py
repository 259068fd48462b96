"""Damaged headers in the reader of the converter: refused with its own error, at once and with little memory."""

from __future__ import annotations

import io
import time
import tracemalloc
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hobbit_cpp.convert.errors import ConvertError
from hobbit_cpp.convert.header import read_header

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").rglob("*.gguf"))
GOOD = [path.read_bytes() for path in CORPUS]

numbers = st.sampled_from((0, 1, 2, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))


@st.composite
def damaged(draw: Any) -> bytes:
    """A small GGUF with numbers written over it, cut or lengthened."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(data), 1500) - 1))
        size = draw(st.sampled_from((1, 4, 8)))
        number = draw(st.one_of(numbers, st.integers(0, (1 << 64) - 1))) % (1 << 8 * size)
        data[at : at + size] = number.to_bytes(size, "little")
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged())
def test_a_damaged_header_is_refused_or_read(data: bytes) -> None:
    tracemalloc.start()
    begin = time.process_time()
    try:
        header = read_header(io.BytesIO(data), "m.gguf", len(data))
        assert all(tensor.name is not None for tensor in header.tensors)
    except ConvertError as e:
        assert "m.gguf" in str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20, peak
    assert time.process_time() - begin < 5
