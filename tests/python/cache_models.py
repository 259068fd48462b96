"""Plain implementations of caches, to compare the engine's with: written from the papers, one access at a time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np

from hobbit_cpp.trace import Trace

Key = Tuple[int, int]  # layer, expert


def accesses(trace: Trace) -> Iterator[Tuple[bool, int, Key]]:
    """(a sequence begins, token of the sequence from 1, key), selection by selection."""
    starts = set(np.cumsum([0, *trace.lens[:-1]]).tolist())
    token = 0
    for t in range(trace.n_tokens):
        token = 1 if t in starts else token + 1
        for layer in range(trace.n_layers):
            for i, expert in enumerate(trace.ids[t, layer]):
                yield t in starts and layer == 0 and i == 0, token, (layer, int(expert))


def lru(trace: Trace, slots: int) -> int:
    hits, cache = 0, OrderedDict[Key, None]()
    for _, _, key in accesses(trace):
        if key in cache:
            hits += 1
            cache.move_to_end(key)
            continue
        if len(cache) == slots:
            cache.popitem(last=False)
        cache[key] = None
    return hits


def layer_lru(trace: Trace, slots: int) -> int:
    per = [slots // trace.n_layers + (layer < slots % trace.n_layers) for layer in range(trace.n_layers)]
    hits = 0
    for layer in range(trace.n_layers):
        one = Trace(trace.ids[:, layer : layer + 1], trace.weights[:, layer : layer + 1], trace.lens, trace.n_experts)
        hits += lru(one, per[layer])
    return hits


@dataclass
class Uses:
    """What is known of an expert: uses, and token of the last one. Tokens count from 1."""

    uses: Dict[Key, int] = field(default_factory=dict)
    last: Dict[Key, int] = field(default_factory=dict)


def by_score(trace: Trace, slots: int, score: Callable[[Uses, Key, int, int], Any], reset: bool) -> int:
    """The entry of the lowest (score(known, entry, running layer, token), last access) goes.

    reset: what is known is forgotten, and tokens count anew, at the begin of each sequence.
    """
    hits, seen = 0, 0
    cache: Dict[Key, int] = {}
    known = Uses()
    for i, (begins, token, key) in enumerate(accesses(trace)):
        if begins and reset:
            known = Uses()
        seen = token if reset else i // (trace.n_layers * trace.k) + 1
        known.uses[key] = known.uses.get(key, 0) + 1
        known.last[key] = seen
        if key in cache:
            hits += 1
        elif len(cache) == slots:
            del cache[min(cache, key=lambda k: (score(known, k, key[0], seen), cache[k]))]
        cache[key] = i
    return hits


def lfu(trace: Trace, slots: int, reset: bool = False) -> int:
    return by_score(trace, slots, lambda known, key, _, __: known.uses.get(key, 0), reset)


def lcu(trace: Trace, slots: int, reset: bool = False) -> int:
    """MoE-APEX with one precision: C/T, and 1/D more for what the last token's pass used."""

    def score(known: Uses, key: Key, running: int, token: int) -> Any:
        out = np.float32(known.uses.get(key, 0)) / np.float32(token)
        if key in known.last and known.last[key] + 1 >= token:
            out += np.float32(1) / (np.float32((key[0] - running) % trace.n_layers) + np.float32(0.1))
        return out

    return by_score(trace, slots, score, reset)


def belady(trace: Trace, slots: int) -> int:
    keys = [key for _, _, key in accesses(trace)]
    positions: Dict[Key, List[int]] = {}
    for i, key in enumerate(keys):
        positions.setdefault(key, []).append(i)
    for later in positions.values():
        later.reverse()
    hits, cache = 0, set[Key]()
    for key in keys:
        positions[key].pop()
        if key in cache:
            hits += 1
            continue
        if len(cache) == slots:
            cache.remove(max(cache, key=lambda k: positions[k][-1] if positions[k] else 1 << 60))
        cache.add(key)
    return hits


def lru_by_layer(trace: Trace, slots: int) -> int:
    """LRU as the engine asks: what a layer finds is pinned before room is made for what it misses."""
    hits, cache = 0, OrderedDict[Key, None]()
    for t in range(trace.n_tokens):
        for layer in range(trace.n_layers):
            keys = [(layer, int(e)) for e in trace.ids[t, layer]]
            missing = [key for key in keys if key not in cache]
            for key in keys:
                if key in cache:
                    hits += 1
                    cache.move_to_end(key)
            for key in missing:
                if len(cache) == slots:
                    cache.popitem(last=False)
                cache[key] = None
    return hits


def arc(keys: List[Any], c: int) -> int:
    """ARC, Megiddo and Modha, FAST'03, figure 4."""
    t1, t2, b1, b2 = (OrderedDict[Any, None]() for _ in range(4))
    p, hits = 0.0, 0

    def evict(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p)):
            b1[t1.popitem(last=False)[0]] = None
        else:
            b2[t2.popitem(last=False)[0]] = None

    for x in keys:
        if x in t1 or x in t2:
            hits += 1
            t1.pop(x, None)
            t2.pop(x, None)
            t2[x] = None
            continue
        full = len(t1) + len(t2) == c
        if x in b1:
            p = min(float(c), p + max(1.0, len(b2) / len(b1)))
            if full:
                evict(False)
            del b1[x]
            t2[x] = None
        elif x in b2:
            p = max(0.0, p - max(1.0, len(b1) / len(b2)))
            if full:
                evict(True)
            del b2[x]
            t2[x] = None
        else:
            if len(t1) + len(b1) >= c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    if full:
                        evict(False)
                else:
                    t1.popitem(last=False)
            else:
                if len(t1) + len(t2) + len(b1) + len(b2) >= 2 * c:
                    b2.popitem(last=False)
                if full:
                    evict(False)
            t1[x] = None
    return hits


def layer_arc(trace: Trace, slots: int) -> int:
    per = [slots // trace.n_layers + (layer < slots % trace.n_layers) for layer in range(trace.n_layers)]
    return sum(arc(trace.ids[:, layer].ravel().tolist(), per[layer]) for layer in range(trace.n_layers))


def page_belady(requests: List[Optional[Set[Any]]], pages: int) -> int:
    """Pages loaded by the optimum for unit pages, a set of them needed at a time; None: nothing is."""
    positions: Dict[Any, List[int]] = {}
    for i, need in enumerate(requests):
        for page in need or ():
            positions.setdefault(page, []).append(i)
    for later in positions.values():
        later.reverse()
    loads, cache = 0, set[Any]()
    for need in requests:
        for page in need or ():
            positions[page].pop()
        for page in sorted(need or ()):
            if page in cache:
                continue
            loads += 1
            cache.add(page)
        while len(cache) > pages:  # what was just read may be it
            cache.remove(max(cache, key=lambda k: positions[k][-1] if positions[k] else 1 << 60))
    return loads
