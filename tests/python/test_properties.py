"""Random operations on the insides of the core (tests/cpp/internals.cpp) beside plain models of them.

HYPOTHESIS_PROFILE: default, ci, expensive.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import hobbit_cpp._lib
from unpatched import lib_for_tests

_common: Dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=60, stateful_step_count=40, **_common)
settings.register_profile("ci", max_examples=150, stateful_step_count=60, **_common)
settings.register_profile("expensive", max_examples=5000, stateful_step_count=200, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LRU, LFU, HOBBIT, LCU = range(4)


@functools.cache
def core() -> Any:
    hobbit_cpp._lib.core()  # the libraries of the package first, or their namesakes would be loaded instead
    lib: Any = ctypes.CDLL(str(lib_for_tests("libhobbit-internals.so")))
    lib.t_cache_new.restype = lib.t_index_new.restype = ctypes.c_void_p
    lib.t_priority.restype = ctypes.c_float
    return lib


def u32(*values: int) -> Any:
    return (ctypes.c_uint32 * len(values))(*values)


def floats(values: Any) -> Any:
    return (ctypes.c_float * len(values))(*values)


# ---- precision (HOBBIT, section 3.2) ---------------------------------------------------------------------------------

NEVER, SKIP, LOW, HIGH = range(4)
EXACT, MISS, WEIGHT, DROP = range(4)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=16), st.floats(0, 1), st.floats(0, 1), st.integers(0, 16))
def test_needs_are_those_of_eq_2(raw: List[int], a: float, b: float, most: int) -> None:
    """s_i is the share of router weight before i, largest first; the first is always high."""
    t1, t2 = sorted((a, b))
    k = len(raw)
    needs, scores = (ctypes.c_uint8 * k)(), floats([0.0] * k)
    core().t_assess(floats(raw), k, MISS, *map(ctypes.c_float, (t1, t2, 0)), most, needs, scores)
    order = sorted(range(k), key=lambda i: (-raw[i], i))
    before = 0
    for place, i in enumerate(order):
        s = before / sum(raw)
        before += raw[i]
        assert abs(scores[i] - s) < 1e-5
        if most and place >= most:
            assert needs[i] == NEVER
        elif place == 0:
            assert needs[i] == HIGH
        elif min(abs(s - t1), abs(s - t2)) > 1e-5:  # beside the thresholds rounding decides
            assert needs[i] == (HIGH if s <= t1 else LOW if s <= t2 else SKIP)


def test_what_is_served_by_need_and_cache() -> None:
    """All combinations, against the rules in words."""
    use_high, use_low, load_high, load_low, skip = range(5)
    absent, in_flight, resident = range(3)
    for how, need, high, low in itertools.product(range(4), range(4), range(3), range(3)):
        got = core().t_resolve(how, need, high, low)
        if need == NEVER:
            want = {skip}
        elif how == EXACT or need == HIGH:
            want = {use_high if high != absent else load_high}
        elif how == WEIGHT:  # whatever is cached
            want = {skip} if need == SKIP else {use_low if low != absent else load_low}
        elif high == resident:
            want = {use_high}  # there already: better than asked for
        elif need == SKIP:
            want = {use_low if low == resident and how == MISS else skip}
        elif low == resident:
            want = {use_low}
        elif high == in_flight:
            want = {use_high}
        else:
            want = {use_low if low == in_flight else load_low}
        assert got in want, (how, need, high, low, got)


# ---- eviction --------------------------------------------------------------------------------------------------------


def priority(how: int, use: Tuple[int, int, int, int], layer: int, now: Tuple[int, int, int], w: Any, cost: float) -> float:
    last, uses, high, low = use
    token, running, n_layer = now
    t, ahead = max(token, 1), (layer - running) % n_layer
    if how == LRU:
        return last
    if how == LFU:
        return uses
    if how == HOBBIT:
        return float(w[0] * last / t + w[1] * uses / t + w[2] * high / t + w[3] * (1 - ahead / n_layer))
    recent = last != 0 and last + 1 >= token
    return (high + cost * low) / t + (1 / (ahead + 0.1) if recent else 0)


@st.composite
def situations(draw: Any) -> Any:
    n_layer = draw(st.integers(1, 60))
    token = draw(st.integers(0, 5000))
    high, low = draw(st.integers(0, token)), draw(st.integers(0, token))
    use = (draw(st.integers(0, token)), high + low, high, low)
    now = (token, draw(st.integers(0, n_layer - 1)), n_layer)
    return use, draw(st.integers(0, n_layer - 1)), now


@given(situations(), st.sampled_from((LRU, LFU, HOBBIT, LCU)), st.floats(0, 1))
def test_priorities_are_those_of_the_papers(situation: Any, how: int, cost: float) -> None:
    use, layer, now = situation
    w = [0.4, 0.3, 0.2, 0.1]
    got = core().t_priority(how, u32(*use), layer, u32(*now), floats(w), ctypes.c_float(cost))
    assert got == pytest.approx(priority(how, use, layer, now, w, cost), rel=1e-4, abs=1e-4)


# ---- the cache -------------------------------------------------------------------------------------------------------

Key = Tuple[int, int, int]  # layer, expert, precision
N_LAYER, N_EXPERT = 3, 5


class CacheBesideAMap(RuleBasedStateMachine):
    """expert_cache and a dictionary of what is in it."""

    cache: Any = None

    @initialize(high=st.integers(1, 6), low=st.integers(0, 4), how=st.sampled_from((LRU, LFU, HOBBIT, LCU)))
    def start(self, high: int, low: int, how: int) -> None:
        self.w = [0.25] * 4
        self.how, self.slots = how, (high, low)
        self.cache = ctypes.c_void_p(core().t_cache_new(N_LAYER, N_EXPERT, high, low, how, floats(self.w), ctypes.c_float(0.5)))
        self.there: Dict[Key, Dict[str, int]] = {}
        self.uses: Dict[Tuple[int, int], Tuple[int, int, int, int]] = {}
        self.clock, self.now, self.running = 0, (0, 0, N_LAYER), 1

    def teardown(self) -> None:
        if self.cache is not None:
            core().t_cache_free(self.cache)

    def some(self, data: Any, **facts: int) -> Optional[Key]:
        keys = sorted(k for k, e in self.there.items() if all(e[name] == value for name, value in facts.items()))
        return data.draw(st.sampled_from(keys)) if keys else None

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def do(self, what: int, key: Key, value: int = 0) -> None:
        core().t_cache_do(self.cache, what, *key, ctypes.c_uint64(value))

    @rule(token=st.integers(0, 3), layer=st.integers(0, N_LAYER - 1))
    def time_goes_on(self, token: int, layer: int) -> None:
        self.now = (self.now[0] + token, layer, N_LAYER)
        self.running += 1
        core().t_cache_now(self.cache, self.now[0], layer, ctypes.c_uint64(self.running))

    @rule(layer=st.integers(0, N_LAYER - 1), expert=st.integers(0, N_EXPERT - 1), high=st.integers(0, 2), low=st.integers(0, 2))
    def use(self, layer: int, expert: int, high: int, low: int) -> None:
        _, n, h, lo = self.uses.get((layer, expert), (0, 0, 0, 0))
        self.uses[layer, expert] = (self.now[0], n + high + low, h + high, lo + low)
        core().t_cache_use(self.cache, layer, expert, self.now[0], high, low)

    @rule()
    def new_sequence(self) -> None:
        self.uses.clear()
        core().t_cache_reset_uses(self.cache)

    @rule(layer=st.integers(0, N_LAYER - 1), expert=st.integers(0, N_EXPERT - 1), p=st.integers(0, 1))
    def insert(self, layer: int, expert: int, p: int) -> None:
        key = (layer, expert, p)
        if key in self.there:
            return
        of_p = {k: e for k, e in self.there.items() if k[2] == p}
        free = self.slots[p] - len(of_p)
        may_go = {k: e for k, e in of_p.items() if e["state"] == 2 and e["pins"] == 0}
        gone = (ctypes.c_int32 * 2)()
        got = core().t_cache_insert(self.cache, *key, gone)
        if free:
            assert got == 1
        elif not may_go:
            assert got == 0
            return
        else:
            victim = (gone[0], gone[1], p)
            assert got == 2 and victim in may_go

            def rank(k: Key) -> Tuple[bool, float]:
                use = self.uses.get(k[:2], (0, 0, 0, 0))
                return may_go[k]["protected"] >= self.running, priority(self.how, use, k[0], self.now, self.w, 0.5)

            protected, worst = rank(victim)
            for k in may_go:
                other_protected, value = rank(k)
                assert (protected, worst - 1e-4) <= (other_protected, value), "something of less worth stayed"
                if other_protected == protected and value == worst:
                    assert may_go[victim]["tick"] <= may_go[k]["tick"], "ties go by the clock"
            del self.there[victim]
        self.there[key] = {"state": 1, "pins": 0, "tick": self.tick(), "protected": 0}

    @rule(data=st.data())
    def fulfil(self, data: Any) -> None:
        key = self.some(data, state=1)
        if key:
            self.do(0, key)
            self.there[key]["state"] = 2

    @rule(data=st.data())
    def abandon(self, data: Any) -> None:
        key = self.some(data, state=1, pins=0)
        if key:
            self.do(1, key)
            del self.there[key]

    @rule(data=st.data(), step=st.sampled_from((1, -1)))
    def pin(self, data: Any, step: int) -> None:
        key = self.some(data)
        if key and self.there[key]["pins"] + step >= 0:
            self.do(2 if step > 0 else 3, key)
            self.there[key]["pins"] += step

    @rule(data=st.data())
    def touch(self, data: Any) -> None:
        key = self.some(data)
        if key:
            self.do(4, key)
            self.there[key]["tick"] = self.tick()

    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        key = self.some(data, state=2, pins=0)
        if key:
            self.do(5, key)
            del self.there[key]

    @rule(data=st.data(), ahead=st.integers(0, 3))
    def protect(self, data: Any, ahead: int) -> None:
        key = self.some(data)
        if key:
            self.do(6, key, self.running + ahead)
            self.there[key]["protected"] = self.running + ahead

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def agree(self) -> None:
        for key in itertools.product(range(N_LAYER), range(N_EXPERT), range(2)):
            assert core().t_cache_state(self.cache, *key) == self.there.get(key, {"state": 0})["state"], key
        for p in range(2):
            mine = [e for k, e in self.there.items() if k[2] == p]
            assert core().t_cache_resident(self.cache, p) == sum(e["state"] == 2 for e in mine)
            evictable = sum(e["state"] == 2 and e["pins"] == 0 for e in mine)
            assert core().t_cache_available(self.cache, p) == self.slots[p] - len(mine) + evictable


def test_the_cache_does_what_a_map_does() -> None:
    run_state_machine_as_test(CacheBesideAMap)


# ---- the index and the plan of the pool ------------------------------------------------------------------------------


@st.composite
def files(draw: Any) -> Any:
    return {
        "layers": draw(st.integers(1, 3)),
        "experts": draw(st.integers(2, 6)),
        "n": draw(st.sampled_from((32, 64, 96))),
        "out": draw(st.sampled_from((32, 64, 160))),
        "alignment": draw(st.sampled_from((32, 64, 4096))),
        "low": draw(st.booleans()),
        "fused": draw(st.booleans()),
        "direct": draw(st.booleans()),
    }


@settings(max_examples=30)
@given(f=files(), share=st.floats(0, 0.9), more=st.integers(0, 1 << 21))
def test_extents_are_where_gguf_py_put_the_bytes(f: Any, share: float, more: int, tmp_path_factory: Any) -> None:
    path: Path = tmp_path_factory.mktemp("index") / "m.gguf"
    writer = gguf.GGUFWriter(path, "tiny")
    writer.add_custom_alignment(f["alignment"])
    writer.add_uint32("tiny.block_count", f["layers"])
    writer.add_uint32("tiny.expert_used_count", 2)
    rng = np.random.default_rng(1)
    for i in range(f["layers"]):
        writer.add_tensor(f"blk.{i}.attn_q.weight", rng.random((f["n"], f["n"]), np.float32))
        shapes = {"down": (f["n"], f["out"]), **({"gate_up": (2 * f["out"], f["n"])} if f["fused"] else {})}
        shapes.update({} if f["fused"] else {"up": (f["out"], f["n"]), "gate": (f["out"], f["n"])})
        for name, shape in shapes.items():
            values = rng.random((f["experts"], *shape)).astype(np.float16)
            writer.add_tensor(f"blk.{i}.ffn_{name}_exps.weight", values)
            if f["low"]:
                q4 = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
                low_name = f"hobbit.low.blk.{i}.ffn_{name}_exps.weight"
                writer.add_tensor(low_name, q4, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    why = ctypes.create_string_buffer(2048)
    index = ctypes.c_void_p(core().t_index_new(str(path).encode(), b"", int(f["direct"]), why))
    assert index, why.raw
    data = path.read_bytes()
    total = [0, 0]
    for tensor in gguf.GGUFReader(path).tensors:
        name, p = tensor.name.removeprefix("hobbit.low."), int(tensor.name.startswith("hobbit."))
        out = (ctypes.c_uint64 * 5)()
        if "exps" not in name:
            assert not core().t_index_find(index, name.encode(), 0, 0, out)
            continue
        total[p] += int(tensor.n_bytes)
        assert not core().t_index_find(index, name.encode(), p, f["experts"], out)
        for e in range(f["experts"]):
            assert core().t_index_find(index, name.encode(), p, e, out)
            _, offset, size, _, room = out
            assert data[offset : offset + size] == tensor.data[e].tobytes()
            assert room >= size and room % 4096 == 0
    facts = (ctypes.c_uint64 * 10)()
    core().t_index_facts(index, facts)
    assert list(facts[:8]) == [f["layers"], f["layers"], f["experts"], 2, f["low"], f["layers"] * f["n"] ** 2 * 4, *total]

    # The plan of a pool uses what it is given, not more, and has room for a token's experts.
    plan = (ctypes.c_uint64 * 5)()
    smallest = facts[9]
    for how in (EXACT, MISS, WEIGHT):
        assert core().t_plan(index, how, ctypes.c_float(share), ctypes.c_uint64(smallest - 1), plan) != 0
        assert core().t_plan(index, how, ctypes.c_float(share), ctypes.c_uint64(smallest + more), plan) == 0
        high, low, streams, used, holds_all = plan
        assert used <= smallest + more and high >= 2 and streams >= 2
        assert high <= f["layers"] * f["experts"] and low <= f["layers"] * f["experts"]
        assert holds_all == (high == f["layers"] * f["experts"])
        assert f["low"] or low == 0
    core().t_index_free(index)
