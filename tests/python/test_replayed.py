"""The routing of one model made to fit another: valid, and as local as it was."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Tuple

import numpy as np
import pytest

from hobbit_cpp.bench.replayed import fit_routing
from hobbit_cpp.errors import ParameterError

N_TOKENS, N_LAYERS = 400, 3


def local_routing(n_expert: int, k: int, seed: int = 0) -> Tuple[Any, Any]:
    """A token keeps most of the experts of the one before it."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((N_TOKENS, N_LAYERS, k), np.uint16)
    for layer in range(N_LAYERS):
        now = list(rng.permutation(n_expert)[:k])
        for token in range(N_TOKENS):
            if rng.random() < 0.7:
                now[rng.integers(k)] = rng.choice(np.setdiff1d(np.arange(n_expert), now))
            ids[token, layer] = now
    return ids, rng.random((N_TOKENS, N_LAYERS, k)).astype(np.float16)


def lru_hit_rate(ids: Any, slots: int) -> float:
    cache: OrderedDict[Tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in ids.astype(int):
        for layer, chosen in enumerate(token):
            for expert in chosen:
                key = (layer, int(expert))
                hits += key in cache
                cache[key] = None
                cache.move_to_end(key)
                if len(cache) > slots:
                    cache.popitem(last=False)
    return hits / int(ids.size)


def test_what_fits_stays_as_it_is() -> None:
    ids, weights = local_routing(32, 4)
    out, mass, how = fit_routing(ids, weights, 32, 32, 4)
    assert out is ids and mass is weights and how == ""


@pytest.mark.parametrize("n_trace, k_trace", [(32, 4), (64, 6)])
@pytest.mark.parametrize("n_expert, k", [(128, 8), (8, 2), (60, 4), (64, 6), (32, 4), (256, 8), (64, 8)])
def test_every_token_chooses_k_experts_that_there_are(n_trace: int, k_trace: int, n_expert: int, k: int) -> None:
    ids, weights = local_routing(n_trace, k_trace)
    out, mass, how = fit_routing(ids, weights, n_trace, n_expert, k)
    assert out.shape == mass.shape == (N_TOKENS, N_LAYERS, k) and out.max() < n_expert
    ordered = np.sort(out, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert np.allclose(mass.astype(np.float64).sum(axis=2), 1, atol=1e-2) or how == ""
    if (n_trace, k_trace) != (n_expert, k):
        assert f"{k_trace} of {n_trace} experts made to fit {k} of {n_expert}" in how


def test_locality_stays() -> None:
    ids, weights = local_routing(32, 4)
    out, _, _ = fit_routing(ids, weights, 32, 128, 16)  # the same ratio
    before = lru_hit_rate(ids, N_LAYERS * 8)
    after = lru_hit_rate(out, N_LAYERS * 32)
    assert before > 0.5 and abs(before - after) < 0.08
    counts = np.bincount(out.reshape(-1), minlength=128)
    assert (counts > 0).all()


def test_what_cannot_fit_is_refused() -> None:
    ids, weights = local_routing(32, 4)
    with pytest.raises(ParameterError, match="cannot be made to fit 9 of 8"):
        fit_routing(ids, weights, 32, 8, 9)


def test_stretches_are_different_ones() -> None:
    ids, weights = local_routing(32, 4)
    out, _, _ = fit_routing(ids, weights, 32, 64, 8)
    assert not np.array_equal(out[..., :4], out[..., 4:] - 32)
