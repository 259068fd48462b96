"""The lossy modes, the statistics, the budget and the errors of `Llama(offload=...)`, on tiny models."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import pytest

import hobbit_cpp._lib as _lib
from decode import load, logits, words
from hobbit_cpp import (
    HobbitError,
    HobbitWarning,
    Llama,
    ModelFileError,
    ModelFormatError,
    NotMoeError,
    OffloadParams,
    ParameterError,
    ReadError,
    StateError,
)
from hobbit_cpp._memory import parse_size
from hobbit_cpp._recording import EVENT_KINDS
from hobbit_cpp._session import Session
from hobbit_cpp.errors import STATUS_TO_EXCEPTION
from hobbit_cpp.params import EVICTION_RULES, PRECISION_RULES
from hobbit_cpp.replay import PRECISION_NAMES
from hobbit_cpp.stats import OffloadCounts
from models import tiny, tiny_dense, tiny_dual
from tiny_models import SHAPES

quiet = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")


def quarter(path: Path) -> int:
    info = Session(str(path), OffloadParams()).info
    return max(info.pool_max // 4, info.pool_min)


def contract(c: OffloadCounts) -> None:
    assert c.selections == c.hits_high + c.hits_low + c.loads_high + c.loads_low + c.skips
    assert 0 <= c.mass_low + c.mass_skipped <= c.mass_total + 1e-6
    assert c.prefetches_useful + c.prefetches_late + c.prefetches_wasted <= c.prefetches
    assert c.bytes_wasted <= c.bytes_prefetch


# ---- precision -------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_hobbit_mode_mixes_precisions_and_counts_them(shape: str) -> None:
    path = tiny_dual(shape)
    # Half of the experts: with a quarter so much is skipped that how fast the disk is decides about the last assertion.
    llm = load(Llama, str(path), 2, offload=OffloadParams(t1=0.3, t2=0.6), expert_cache=2 * quarter(path))
    exact = load(Llama, str(path), 2)
    tokens = words(llm, 80)
    got, want = logits(llm, tokens, 1), logits(exact, tokens, 1)
    stats = llm.offload_stats()
    contract(stats)
    for layer in stats.layers:
        contract(layer)
    assert sum(layer.selections for layer in stats.layers) == stats.selections
    info = llm.offload_info
    assert stats.selections == 80 * info.n_moe_layer * info.n_expert_used
    assert stats.loads_low > 0 and stats.skips > 0 and stats.mass_skipped > 0
    assert not np.array_equal(got, want)
    assert np.isfinite(got).all()
    # Lossy, but the same model: far nearer to exact than chance.
    agree = (got.argmax(-1) == want.argmax(-1)).mean()
    assert agree > 0.5, agree
    assert stats.bytes_read > 0 and stats.eval_seconds > 0
    llm.reset_offload_stats()
    assert llm.offload_stats().selections == llm.offload_stats().bytes_read == 0
    llm.close()
    exact.close()


@quiet
def test_weight_rule_does_not_depend_on_the_cache() -> None:
    path = tiny_dual("qwen3moe")
    outs = []
    for pool in (quarter(path), 2 * quarter(path)):
        for warm in (False, True):
            params = OffloadParams(precision_rule="weight", t1=0.3, t2=0.6, prefetch_depth=2, prefetch_always=True)
            llm = load(Llama, str(path), 2, offload=params, expert_cache=pool)
            tokens = words(llm, 60)
            if warm:
                logits(llm, tokens[::-1], 7)
            outs.append(logits(llm, tokens, 1))
            assert llm.offload_stats().mass_skipped > 0
            llm.close()
    for other in outs[1:]:
        assert np.array_equal(outs[0], other)


@quiet
@pytest.mark.parametrize("rule", ["miss", "weight"])
def test_wide_open_thresholds_are_exact(rule: str) -> None:
    path = tiny_dual("mixtral")
    llm = load(Llama, str(path), 1, offload=OffloadParams(precision_rule=rule, t1=1.0, t2=1.0), expert_cache=quarter(path))
    stock = load(Llama, str(path), 1)
    tokens = words(llm, 40)
    assert np.array_equal(logits(llm, tokens, 16), logits(stock, tokens, 16))
    llm.close()


@quiet
def test_skips_without_renormalising_lose_router_mass() -> None:
    path = tiny_dual("mixtral")
    outs = {}
    for renormalize in (True, False):
        params = OffloadParams(precision_rule="weight", t1=0.0, t2=0.0, renormalize=renormalize)
        llm = load(Llama, str(path), 1, offload=params, expert_cache=quarter(path))
        outs[renormalize] = logits(llm, words(llm, 20), 1)
        stats = llm.offload_stats()
        # Top-1 only: of two selections a token one is skipped.
        assert stats.skips * 2 == stats.selections and stats.loads_low == 0
        llm.close()
    assert not np.array_equal(outs[True], outs[False])


# ---- cache and prefetch ----------------------------------------------------------------------------------------------


@quiet
def test_everything_fits_then_nothing_is_read_twice() -> None:
    path = tiny("qwen3moe")
    llm = load(Llama, str(path), 2, offload="lru", expert_cache="100%")
    tokens = words(llm, 100)
    logits(llm, tokens, 64)
    logits(llm, tokens, 64)
    stats = llm.offload_stats()
    assert stats.loads_high <= llm.offload_info.n_moe_layer * llm.offload_info.n_expert
    llm.reset_offload_stats()
    logits(llm, tokens, 64)
    assert llm.offload_stats().bytes_read == 0 and llm.offload_stats().hit_rate == 1.0
    llm.close()


@quiet
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_changes_no_number(depth: int) -> None:
    path = tiny("deepseek2")
    params = OffloadParams(exact=True, prefetch_depth=depth, prefetch_always=True)
    llm = load(Llama, str(path), 2, offload=params, expert_cache=2 * quarter(path))
    stock = load(Llama, str(path), 2)
    tokens = words(llm, 60)
    assert np.array_equal(logits(llm, tokens, 1), logits(stock, tokens, 1))
    stats = llm.offload_stats()
    contract(stats)
    assert (stats.prefetches > 0) == (depth > 0)
    assert set(stats.recall) == set(range(1, min(depth, llm.offload_info.n_moe_layer - 1) + 1))
    llm.close()


@quiet
def test_prediction_through_the_same_router_is_right() -> None:
    """With every layer's router alike and a residual stream that hardly changes, the next layer is known."""
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload=OffloadParams(prefetch_depth=1, prefetch_always=True), expert_cache="100%")
    logits(llm, words(llm, 60), 1)
    stats = llm.offload_stats()
    chance = llm.offload_info.n_expert_used / llm.offload_info.n_expert
    assert stats.recall[1] > 1.5 * chance
    llm.close()


# ---- generation ------------------------------------------------------------------------------------------------------


@quiet
def test_completion_streams_and_is_reproducible() -> None:
    path = tiny("mixtral", "Q8_0")
    plain: Any = Llama(str(path), n_ctx=256, verbose=False, seed=1)
    llm: Any = Llama(str(path), offload="hobbit", exact=True, n_ctx=256, verbose=False, seed=1, expert_cache=quarter(path))
    for _ in range(2):
        a = plain.create_completion("the expert", max_tokens=24, temperature=0.0)["choices"][0]["text"]
        b = llm.create_completion("the expert", max_tokens=24, temperature=0.0)["choices"][0]["text"]
        c = "".join(
            piece["choices"][0]["text"]
            for piece in llm.create_completion("the expert", max_tokens=24, temperature=0.0, stream=True)
        )
        assert a == b == c
    plain.close()
    llm.close()


@quiet
def test_two_models_in_one_process_in_two_threads() -> None:
    paths = [tiny_dual("mixtral"), tiny_dual("qwen3moe")]
    llms = [load(Llama, str(p), 1, offload="hobbit", exact=True, expert_cache=quarter(p)) for p in paths]
    tokens = [words(llm, 60) for llm in llms]
    want = [logits(llm, t, 8) for llm, t in zip(llms, tokens)]
    got: list[Any] = [None, None]

    def run(i: int) -> None:
        got[i] = logits(llms[i], tokens[i], 8)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(a, b) for a, b in zip(got, want))
    for llm in llms:
        llm.close()


@quiet
def test_close_is_safe_twice_and_use_after_it_is_refused() -> None:
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload="hobbit", expert_cache="100%")
    logits(llm, words(llm, 20), 4)
    llm.close()
    llm.close()
    with pytest.raises(StateError):
        llm.offload_stats()
    with pytest.raises(StateError):
        llm.eval([1, 2])


@quiet
def test_a_forked_child_is_told_to_load_its_own(tmp_path: Path) -> None:
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload="hobbit", expert_cache="100%")
    logits(llm, words(llm, 10), 4)
    pid = os.fork()
    if pid == 0:
        try:
            llm.eval([1, 2])
            code = 1
        except StateError:
            llm.close()
            code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert np.isfinite(logits(llm, words(llm, 10), 4)).all()
    llm.close()


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.no_asan
@pytest.mark.parametrize("memory", ["20MiB", "115MiB"])
def test_budget_too_small_says_what_is_enough(memory: str) -> None:
    """Before the weights are read or after: the budget that the error names works, and much less does not."""
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from hobbit_cpp import Llama, MemoryBudgetError\n"
        "try:\n"
        f"    llm = Llama({str(tiny('mixtral'))!r}, offload='hobbit', memory=sys.argv[1], n_ctx=8192, verbose=False)\n"
        "    print('pool', llm.offload_stats().pool_bytes); llm.close()\n"
        "except MemoryBudgetError as e:\n"
        "    print(e)\n"
    )

    def load_with(budget: str) -> str:
        return subprocess.run([sys.executable, "-c", program, budget], check=True, capture_output=True, text=True).stdout

    said = load_with(memory)
    enough = re.search(r"at least ([\d.]+) MiB", said)
    assert enough is not None, said
    assert load_with(f"{float(enough[1]):.0f}MiB").startswith("pool")
    assert "at least" in load_with(f"{float(enough[1]) * 0.9:.0f}MiB")


def test_small_pool_warns() -> None:
    path = tiny("mixtral")
    with pytest.warns(HobbitWarning, match="one token uses"):
        llm = load(Llama, str(path), 1, offload="lru", expert_cache=Session(str(path), OffloadParams()).info.pool_min)
    llm.close()


@pytest.mark.parametrize("size", ["0", "-1", "4 bananas", "101%", "", "nan", True, 1.5, None])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ParameterError):
        parse_size(size, of=100)


@pytest.mark.parametrize(
    "size,want",
    [
        ("4GiB", 4 << 30),
        ("700MiB", 700 << 20),
        ("1.5g", 3 << 29),
        ("2K", 2048),
        ("1GB", 10**9),
        ("50%", 50),
        (7, 7),
        ("8 B", 8),
    ],
)
def test_sizes(size: Any, want: int) -> None:
    assert parse_size(size, of=100) == want


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_parameters_out_of_range(tmp_path: Path) -> None:
    path = str(tiny("mixtral"))
    for bad in (
        {"offload": "hobit"},
        {"offload": 3},
        {"offload": None, "memory": "1GiB"},
        {"offload": None, "exact": True},
        {"offload": "hobbit", "use_mlock": True},
        {"offload": "hobbit", "vocab_only": True},
        {"offload": OffloadParams(io_threads=0)},
        {"offload": OffloadParams(prefetch_depth=9)},
        {"offload": OffloadParams(prefetch_depth=-1)},
        {"offload": OffloadParams(low_share=0.95)},
        {"offload": OffloadParams(eviction_weights=(1, 1, 1, 1))},
    ):
        with pytest.raises(ParameterError):
            Llama(path, verbose=False, **bad)
    for wrong in (
        {"precision_rule": "exactly"}, {"eviction": "fifo"}, {"t1": 0.5}, {"t1": 0.9, "t2": 0.5}, {"max_experts": 0},
        {"precision_rule": "drop"}, {"drop_fraction": 0.5}, {"precision_rule": "drop", "drop_fraction": -1.0},
    ):  # fmt: skip
        with pytest.raises(ParameterError):
            OffloadParams(**wrong)


def damaged(tmp_path: Path, how: str) -> Tuple[Path, type]:
    source = tiny("mixtral")
    path = tmp_path / f"{how}.gguf"
    if how == "missing":
        return path, ModelFileError
    if how == "folder":
        path.mkdir()
        return path, ModelFileError
    shutil.copy(source, path)
    size = path.stat().st_size
    if how == "empty":
        os.truncate(path, 0)
    elif how == "header":
        os.truncate(path, 5000)
    elif how == "short":
        os.truncate(path, size - 100_000)
    elif how == "garbage":
        path.write_bytes(b"GGUF" + os.urandom(4096))
    elif how == "text":
        path.write_text("not a model")
    return path, ModelFormatError


@pytest.mark.parametrize("how", ["missing", "folder", "empty", "header", "short", "garbage", "text"])
def test_files_that_are_no_models(how: str, tmp_path: Path) -> None:
    path, error = damaged(tmp_path, how)
    with pytest.raises(error) as e:
        Llama(str(path), offload="hobbit", verbose=False)
    assert isinstance(e.value, HobbitError) and str(path) in str(e.value)


def test_a_dense_model_runs_as_stock_and_says_so() -> None:
    path = str(tiny_dense())
    stock = load(Llama, path, 1)
    with pytest.warns(HobbitWarning, match=r"nothing to offload.*no memory limit is applied"):
        llm = load(Llama, path, 1, offload="hobbit", exact=True, memory="8GiB")
    tokens = words(llm, 20)
    assert np.array_equal(logits(llm, tokens, 8), logits(stock, tokens, 8))
    assert not llm.offloaded
    with pytest.raises(StateError, match="dense"):
        llm.offload_stats()
    llm.close()
    with pytest.raises(NotMoeError, match="nothing to offload"):
        Session(path, OffloadParams())
    with pytest.warns(HobbitWarning, match="nothing to offload"):
        llm = Llama(path, offload="hobbit", quality="1%", n_ctx=100, n_threads=1, verbose=False)
    llm.eval(words(llm, 120)[:120])  # the context is 256
    assert llm.n_tokens == 120
    llm.close()


@quiet
def test_a_file_cut_short_while_in_use_raises_and_can_be_used_when_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny("mixtral", "Q8_0"), path)
    whole = path.read_bytes()
    llm = load(Llama, str(path), 2, offload="lru", expert_cache=quarter(path))
    tokens = words(llm, 40)
    want = logits(llm, tokens, 8)
    # Truncated in place: the open file loses its end.
    os.truncate(path, len(whole) - 4_000_000)
    with pytest.raises(ReadError, match="short read"):
        for _ in range(3):
            logits(llm, tokens, 8)
    with open(path, "r+b") as f:
        f.write(whole)
    assert np.array_equal(want, logits(llm, tokens, 8))
    llm.close()


def test_errors_and_statuses_are_one_to_one() -> None:
    _ffi, lib = _lib.core()
    statuses = {name for name in dir(lib) if name.startswith("HOBBIT_ERR_")}
    assert statuses == set(STATUS_TO_EXCEPTION)
    assert len(set(STATUS_TO_EXCEPTION.values())) == len(statuses)
    assert all(issubclass(cls, HobbitError) for cls in STATUS_TO_EXCEPTION.values())
    for cls in STATUS_TO_EXCEPTION.values():  # what a pool of processes hands on
        e = pickle.loads(pickle.dumps(cls("why", errno.EIO)))
        assert type(e) is cls and str(e) == "why" and e.os_errno == errno.EIO
        assert not isinstance(e, OSError) or e.errno == errno.EIO


def test_numbers_of_names_are_those_of_the_c_api() -> None:
    _ffi, lib = _lib.core()

    def numbers(prefix: str, but: str = "") -> Dict[str, int]:
        found = {
            name[len(prefix) :].lower().replace("_", "-"): int(getattr(lib, name)) for name in dir(lib) if name.startswith(prefix)
        }
        return {name: number for name, number in found.items() if name != but}

    assert numbers("HOBBIT_EVICT_") == EVICTION_RULES
    assert numbers("HOBBIT_PRECISION_", but="demand") == PRECISION_RULES
    assert numbers("HOBBIT_EVENT_") == {name: number for number, name in enumerate(EVENT_KINDS)}
    assert numbers("HOBBIT_PRECISION_") == {name: number for number, name in enumerate(PRECISION_NAMES)}


def test_offload_none_loads_no_engine() -> None:
    program = (
        "from hobbit_cpp import Llama; import sys\n"
        f"llm = Llama({str(tiny('mixtral'))!r}, n_ctx=64, verbose=False); llm.eval([1, 2, 3])\n"
        "assert 'libhobbit' not in open('/proc/self/maps').read() and 'hobbit_cpp._hobbit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_who_has_to_wait_for_experts_says_so() -> None:
    llm: Any = Llama(
        str(tiny("mixtral")), offload=OffloadParams(mode="lru", expert_cache="30%"), n_ctx=64, n_threads=1, verbose=False
    )
    for token in range(1, 9):
        llm.eval([token])
    s = llm.offload_stats()
    llm.close()
    assert s.loads_high > 0 and 0 < s.stall_seconds < s.eval_seconds
