"""Probes of disk and cores: sane, kept per machine, never a reason to fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hobbit_cpp import _cgroups, _lib, probe
from hobbit_cpp.probe import DiskProbe
from models import tiny, tiny_dual

Q8_0 = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "is_busy", lambda: False)
    return tmp_path / "cache"


def test_disk_is_probed_at_every_depth() -> None:
    found = probe.probe_disk(tiny("mixtral"), seconds=0.02)
    assert found is not None
    assert tuple(found.bandwidth) == probe.DEPTHS
    assert all(rate > 0 for rate in found.bandwidth.values())
    assert found.read_bytes >= 256 * 256 * 2  # a slice of an expert in F16
    assert found.at(found.best_depth) >= 0.95 * found.best


def test_between_depths_and_noise_between_them() -> None:
    found = probe.DiskProbe(1, {1: 100.0, 2: 150.0, 4: 200.0}, True, 0.0)
    assert (found.at(0.5), found.at(1), found.at(3), found.at(9)) == (50.0, 100.0, 175.0, 200.0)
    # as a busy machine measured it
    noisy = probe.DiskProbe(1, {1: 10.0, 2: 20.0, 4: 80.0, 8: 30.0, 16: 90.0}, True, 0.0)
    depths = [d / 4 for d in range(1, 80)]
    for a, b in zip(depths, depths[1:]):
        assert noisy.at(a) <= noisy.at(b) * (1 + 1e-9)  # no less at a greater depth
        assert noisy.at(a) / a >= noisy.at(b) / b * (1 - 1e-9)  # no less for each read at a smaller


def test_low_copies_are_probed_at_their_size() -> None:
    high = probe.probe_disk(tiny_dual("mixtral"), seconds=0.02)
    low = probe.probe_disk(tiny_dual("mixtral"), low=True, seconds=0.02)
    assert high is not None and low is not None and low.read_bytes < high.read_bytes


def test_figures_are_kept_until_fresh_ones_are_asked_for(own_cache: Path) -> None:
    first = probe.probe_disk(tiny("mixtral"), seconds=0.02)
    assert probe.probe_disk(tiny("mixtral"), seconds=0.02) == first
    again = probe.probe_disk(tiny("mixtral"), seconds=0.02, fresh=True)
    assert again is not None and first is not None and again.measured > first.measured
    assert len(json.loads((own_cache / "probes.json").read_text())["figures"]) == 1


def test_what_cannot_be_read_or_kept_is_no_error(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.probe_disk(tmp_path / "absent.gguf") is None
    assert probe.probe_compute(Q8_0, 100, 64, 1) is None  # no whole blocks
    own_cache.mkdir()
    (own_cache / "probes.json").write_text("{ not JSON")
    assert probe.probe_disk(tiny("mixtral"), seconds=0.01) is not None
    monkeypatch.setenv("HOBBIT_CACHE_DIR", "/proc/nowhere")
    assert probe.probe_compute(Q8_0, 256, 64, 1, seconds=0.01)


def test_products_and_floors_are_kept(own_cache: Path) -> None:
    rate = probe.probe_compute(Q8_0, 256, 256, 2, seconds=0.01)
    assert rate is not None and rate > 1e6
    assert probe.probe_compute(Q8_0, 256, 256, 2, seconds=0.01) == rate
    assert probe.recall_floor(tiny("mixtral"), 2) is None
    probe.remember_floor(tiny("mixtral"), 2, 0.125)
    assert probe.recall_floor(tiny("mixtral"), 2) == 0.125
    assert probe.recall_floor(tiny("mixtral"), 1) is None


def test_figures_of_the_cores_are_those_of_a_build(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of another build are faster or slower."""
    probe.remember_floor(tiny("mixtral"), 2, 0.125)
    assert probe.probe_compute(Q8_0, 256, 256, 2, seconds=0.01)
    assert len(json.loads((own_cache / "probes.json").read_text())["figures"]) == 2
    (tmp_path / "libhobbit.so").touch()
    monkeypatch.setattr(_lib, "LIB_DIR", tmp_path)
    assert probe.recall_floor(tiny("mixtral"), 2) is None
    assert probe.probe_compute(Q8_0, 256, 256, 2, seconds=0.01)
    assert len(json.loads((own_cache / "probes.json").read_text())["figures"]) == 3


def test_figures_of_a_busy_machine_are_not_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "is_busy", lambda: True)
    assert probe.probe_compute(Q8_0, 256, 64, 1, seconds=0.01)
    assert not (own_cache / "probes.json").exists()


def test_figures_of_a_throttled_disk_are_kept_apart(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")
    number = model.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    monkeypatch.setattr(_cgroups, "_ROOT", tmp_path)
    assert _cgroups.read_limit(model) is None
    free = probe.probe_disk(model, seconds=0.02)

    # version 1, then version 2 with less; another disk's is none of ours
    (tmp_path / "blkio").mkdir()
    (tmp_path / "blkio/blkio.throttle.read_bps_device").write_text(f"250:9 7\n{device} 500000000\n")
    assert _cgroups.read_limit(model) == 500_000_000
    (tmp_path / "io.max").write_text(f"250:9 rbps=7 wbps=max\n{device} rbps=400000000 wbps=max riops=max wiops=5\n")
    assert _cgroups.read_limit(model) == 400_000_000
    throttled = probe.probe_disk(model, seconds=0.02)
    assert free is not None and throttled is not None and throttled.measured > free.measured
    (tmp_path / "io.max").write_text(f"{device} rbps=max wbps=400000000\n")
    assert _cgroups.read_limit(model) == 500_000_000

    (tmp_path / "blkio/blkio.throttle.read_bps_device").unlink()
    assert probe.probe_disk(model) == free


def test_a_floor_is_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(probe, "is_busy", lambda: False)
    model = tmp_path / "m"
    model.write_text("x")
    for seconds, kept in ((0.125, 0.125), (0.25, 0.125), (0.1, 0.1)):
        probe.remember_floor(model, 2, seconds)
        assert probe.recall_floor(model, 2) == kept


def test_nearly_the_most_is_enough() -> None:
    assert DiskProbe(1, {1: 50.0, 2: 96.0, 4: 100.0}, True, 0.0).best_depth == 2
