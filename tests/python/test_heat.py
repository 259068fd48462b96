"""Heat: what one run used is what the next begins with; what is wrong with its file changes nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import numpy as np
import pytest

from decode import load, logits, words
from hobbit_cpp import Llama, OffloadParams, OffloadStats, _heat
from models import tiny

MODEL = "mixtral"


@pytest.fixture
def heat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On, in an empty folder, which is returned."""
    monkeypatch.setenv("HOBBIT_HEAT", "1")
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path))
    return tmp_path / "heat"


def open_(shape: str = MODEL, **params: Any) -> Llama:
    options: Any = {"exact": True, "prefetch_depth": 0, "expert_cache": "50%", "yield_memory": False, **params}
    llm: Llama = load(Llama, str(tiny(shape)), 1, offload=OffloadParams(**options))
    return llm


def first_tokens(llm: Llama, n: int = 4, warms: bool = False) -> OffloadStats:
    """Once the pool is warm, or (not `warms`) it would be if anything was read."""
    end = time.monotonic() + (60 if warms else 0.5)
    while time.monotonic() < end and not (warms and llm.offload_stats().warmed >= llm.offload_stats().slots_high):
        time.sleep(0.02)
    llm.reset_offload_stats()
    for token in words(llm, n):
        llm.eval([token])
    return llm.offload_stats()


def run(n: int = 60, **params: Any) -> List[Path]:
    """Uses the model and closes it; the files of heat."""
    llm = open_(**params)
    for token in words(llm, n):
        llm.eval([token])
    llm.close()
    return sorted(_heat.cache_folder().rglob("*.bin"))


def test_a_second_run_finds_its_first_experts_in_memory(heat: Path) -> None:
    llm = open_()
    cold = first_tokens(llm)
    expected = logits(llm, words(llm, 20), 1)
    llm.close()
    assert cold.loads_high > 0 and [p.parent for p in heat.glob("*.bin")] == [heat]

    llm = open_()
    slots = llm.offload_stats().slots_high
    warm = first_tokens(llm, warms=True)
    assert warm.loads_high < cold.loads_high and warm.bytes_demand < cold.bytes_demand
    assert warm.prefetches == warm.prefetches_useful == warm.bytes_prefetch == 0
    assert warm.resident_high == slots
    assert np.array_equal(logits(llm, words(llm, 20), 1), expected)
    llm.close()


def test_the_reads_are_counted_apart(heat: Path) -> None:
    run()
    llm = open_()
    end = time.monotonic() + 30
    while llm.offload_stats().warmed < llm.offload_stats().slots_high:
        assert time.monotonic() < end, llm.offload_stats()
        time.sleep(0.01)
    s = llm.offload_stats()
    assert s.bytes_warmed >= s.warmed * llm.offload_info.bytes_expert_high and s.bytes_read == 0
    llm.close()


def test_heat_adds_up_over_runs(heat: Path) -> None:
    (file,) = run()
    first = file.read_bytes()
    llm = open_()
    for token in words(llm, 2):
        llm.eval([token])
    llm.close()
    before, after = (np.frombuffer(data[16:-4], "<f4")[::2] for data in (first, file.read_bytes()))
    assert not np.array_equal(before, after) and np.allclose(before, after, atol=0.03)
    assert np.isclose(before.sum(), 2 * len(before) / 8, rtol=0.01)  # k uses a token and layer
    assert not list(heat.glob("*.bin.*"))


def test_it_is_saved_now_and_then(heat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_()
    llm.eval([1])
    assert not heat.exists()
    monkeypatch.setattr(_heat, "SAVE_SECONDS", 0.0)
    llm.eval([1])
    assert len(list(heat.glob("*.bin"))) == 1
    llm.close()


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "flipped", "empty", "version", "other shape", "nonsense", "not finite", "folder"]
)
def test_a_file_that_is_not_right_changes_nothing(heat: Path, damage: str) -> None:
    (file,) = run()
    data = file.read_bytes()
    body = bytearray(data[:-4])
    if damage == "version":
        body[7] += 1
    elif damage == "other shape":
        body[8:16] = body[12:16] + body[8:12]
    elif damage == "nonsense":
        body[16:] = np.full((len(body) - 16) // 4, 1e9, "<f4").tobytes()
    elif damage == "not finite":
        body[16:] = np.full((len(body) - 16) // 4, np.nan, "<f4").tobytes()
    flipped = bytearray(data)
    flipped[40] ^= 1
    other = {"cut": data[:-9], "longer": data + b"x", "flipped": bytes(flipped), "empty": b""}
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(other.get(damage, bytes(body) + _heat._crc(bytes(body))))
    llm = open_()
    time.sleep(0.3)
    assert llm.offload_stats().bytes_warmed == 0
    assert first_tokens(llm).loads_high > 0
    llm.close()
    assert file.is_dir() or file.read_bytes()[:8] == data[:8]  # a good one again


def test_another_model_has_its_own(heat: Path) -> None:
    run()
    llm = open_("qwen3moe")
    time.sleep(0.3)
    assert llm.offload_stats().bytes_warmed == 0
    llm.eval([1])
    llm.close()
    assert len(list(heat.glob("*.bin"))) == 2


def test_where_nothing_can_be_written(heat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (heat.parent / "file").write_text("")
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(heat.parent / "file"))  # not a folder
    assert run() == []


def test_only_the_last_models_are_kept(heat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_heat, "MAX_FILES", 3)
    heat.mkdir()
    for i in range(5):
        (heat / f"{i}.bin").write_bytes(b"")
        os.utime(heat / f"{i}.bin", (i, i))
    assert [p.name for p in run() if len(p.name) == 5] == ["3.bin", "4.bin"]


@pytest.mark.parametrize("params", [{"heat": False}, {"eviction": "lru"}, {"eviction": "layer-lru"}, {"mode": "lru"}])
def test_runs_without_heat(heat: Path, params: Any) -> None:
    assert run(n=4, **params) == []


def test_the_environment_switches_it_off(heat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_HEAT", "0")
    assert run(n=4) == []


def test_a_model_that_was_only_loaded_leaves_nothing(heat: Path) -> None:
    open_().close()
    assert not heat.exists()


def test_closed_and_cancelled_while_it_warms(heat: Path) -> None:
    run()
    open_().close()
    llm = open_()
    llm.cancel()
    session = llm._session
    assert session is not None
    session.cancel()
    session.clear_cancel()  # waits until nothing is read, which must end
    assert first_tokens(llm).selections > 0
    llm.close()


def test_heat_is_saved_every_three_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path))
    clock = [1000.0]
    monkeypatch.setattr(_heat, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    file = _heat.HeatFile("sha256:ab", 1, 2)
    saved: List[float] = []

    def heat() -> bytes:
        saved.append(clock[-1])
        return bytes(16)

    for now in (1001.0, 1179.0, 1181.0, 1182.0, 1360.0, 1362.0):
        clock.append(now)
        file.decoded(heat)
    assert saved == [1181.0, 1362.0]
