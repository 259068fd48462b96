"""What the finished file is like: perplexity, routing, importance of the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np

from .transformer import (
    FloatArray,
    IntArray,
    Model,
    attend,
    drop,
    expert_outputs,
    importance,
    log_likelihood,
    perplexity,
    rms_norm,
    select,
)

#: Layers ahead for which the next routing is guessed.
AHEAD = (1, 2, 3)
#: Shares of the selections to drop.
DROPPED = (0.05, 0.1, 0.2, 0.4)


@dataclass
class Report:
    """Figures of a model on held-out text; see ``lines`` for their meaning."""

    perplexity: float
    dense: float
    recall_plain: dict[int, float]
    recall_normed: dict[int, float]
    reuse: float
    reuse_chance: float
    load_max: float
    load_min: float
    load_entropy: float
    top_weight: float
    importance_06: float
    importance_09: float
    quantiles: list[float]
    pearson: float
    pearson_share: float
    drops: list[tuple[float, float, float]]

    def lines(self) -> list[str]:
        """Human-readable figures."""
        return [
            f"perplexity: {self.perplexity:.2f}, dense {self.dense:.2f}, ratio {self.perplexity / self.dense:.3f}",
            *(
                f"recall of the routing {a} layers ahead: "
                f"plain {self.recall_plain[a]:.3f}, "
                f"norm-corrected {self.recall_normed[a]:.3f}"
                for a in self.recall_plain
            ),
            f"reuse on the next token: {self.reuse:.3f} (chance {self.reuse_chance:.3f})",
            f"load: max/mean {self.load_max:.2f}, min/mean {self.load_min:.2f}, entropy {self.load_entropy:.3f} of 1",
            f"mean largest weight: {self.top_weight:.3f}",
            "importance s: "
            f"{self.importance_06:.1%} <= 0.6, {self.importance_09:.1%} <= 0.9; "
            "quantiles 25/50/75/90/95 %: " + " ".join(f"{q:.2f}" for q in self.quantiles),
            f"correlation of router weight and norm of the weighted output: {self.pearson:.3f} over all tokens, "
            f"{self.pearson_share:.3f} with the norm as a share of the token's",
            *(
                f"dropping {share:.1%} (s > {limit:.3f}): perplexity {change:+.2%}"
                for limit, share, change in self.drops
            ),
        ]


class _Routing:
    """Collects routing figures layer by layer (means over layers in the end)."""

    def __init__(self, shape: tuple[int, int], n_expert: int) -> None:
        self.shape, self.n_expert = shape, n_expert
        self.past: list[tuple[FloatArray, FloatArray]] = []
        self.recall: dict[tuple[str, int], list[float]] = {}
        self.rows: dict[str, list[float]] = {}
        self.weights: list[FloatArray] = []

    def _note(self, name: str, value: float) -> None:
        self.rows.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        """Mean over the layers."""
        return float(np.mean(self.rows[name]))

    def layer(
        self,
        unit: FloatArray,
        norm: FloatArray,
        router: FloatArray,
        chosen: IntArray,
        weights: FloatArray,
    ) -> None:
        """Add a layer.

        Args:
            unit: normalised hidden states before the norm weights, (tokens, n_embd)
            norm: the norm weights, (n_embd,)
            router: (n_expert, n_embd)
            chosen: (tokens, k)
            weights: (tokens, k)
        """
        k = chosen.shape[1]
        used = np.zeros((len(chosen), self.n_expert), dtype=bool)
        np.put_along_axis(used, chosen, True, 1)
        for ahead, (old_unit, old_norm) in zip(AHEAD, reversed(self.past)):
            for kind, weight in (("plain", old_norm), ("normed", norm)):
                guess, _ = select((old_unit * weight) @ router.T, k)
                hits = np.take_along_axis(used, guess, 1).mean()
                self.recall.setdefault((kind, ahead), []).append(float(hits))
        self.past = [*self.past, (unit, norm)][-max(AHEAD) :]
        grid = used.reshape(*self.shape, self.n_expert)
        self._note("reuse", float((grid[:, 1:] & grid[:, :-1]).sum(-1).mean()) / k)
        share = used.mean(0, dtype=np.float64)
        self._note("chance", float((share**2).sum()) / k)
        self._note("max", float(share.max() / share.mean()))
        self._note("min", float(share.min() / share.mean()))
        p = share[share > 0] / share.sum()
        self._note("entropy", float(-(p * np.log(p)).sum() / np.log(self.n_expert)))
        self.weights.append(weights)

    def outputs(self, weights: FloatArray, norms: FloatArray) -> None:
        """Add the norms of a layer's weighted outputs, (tokens, k) both."""
        self._note("pearson", float(np.corrcoef(weights.ravel(), norms.ravel())[0, 1]))
        # What a choice among one token's experts needs: tokens differ in the size of all their outputs.
        share = norms / np.maximum(norms.sum(1, keepdims=True), 1e-12)
        self._note("pearson_share", float(np.corrcoef(weights.ravel(), share.ravel())[0, 1]))


def _run(
    model: Model,
    ids: IntArray,
    limits: list[float],
    routing: _Routing | None,
    step: Callable[[int], None],
) -> list[float]:
    """Perplexities with selections above each limit dropped (infinity: none).

    ``routing`` collects figures of the first of them.
    """
    shape = model.shape
    embedding = model.tensor("token_embd.weight")
    # One stream of sequences per limit: (limits, sequences, length, n_embd).
    h = np.repeat(embedding[ids][None], len(limits), axis=0)
    del embedding
    n = ids.size
    flat = h.reshape(-1, shape.n_embd)
    for layer in range(shape.n_layer):
        attend(h.reshape(-1, *h.shape[2:]), model.attention(layer), shape)
        norm = model.tensor(f"blk.{layer}.ffn_norm.weight")
        moe = model.experts(layer)
        unit = rms_norm(flat, np.ones_like(norm), shape.eps)
        x = unit * norm
        chosen, weights = select(x @ moe.router.T, moe.top_k)
        norms = np.zeros_like(weights)
        if routing is not None:
            routing.layer(unit[:n], norm, moe.router, chosen[:n], weights[:n])
        for i, limit in enumerate(limits):
            rows = slice(i * n, (i + 1) * n)
            weights[rows] = drop(weights[rows], limit)
        flat += expert_outputs(x, moe, chosen, weights, norms)
        if routing is not None:
            routing.outputs(weights[:n], norms[:n])
        step(layer)
    return [perplexity(log_likelihood(part, ids, model), ids) for part in h]


def evaluate(model: Model, ids: IntArray, dense: float, step: Callable[[int], None]) -> Report:
    """Measure a written model on held-out tokens (sequences, length).

    Args:
        model: the experts model
        ids: the tokens
        dense: perplexity of the dense model on them
        step: called once per layer and pass, of which there are two
    """
    shape = model.shape
    routing = _Routing((ids.shape[0], ids.shape[1]), shape.n_expert)
    base = _run(model, ids, [float("inf")], routing, step)[0]
    weights = np.stack(routing.weights)
    s = importance(weights)
    # The first expert of a token has s = 0 and is never dropped.
    limits = [float(np.quantile(s, 1.0 - share)) for share in DROPPED]
    changed = _run(model, ids, limits, None, lambda i: step(i + shape.n_layer))
    recall = {key: float(np.mean(values)) for key, values in routing.recall.items()}
    ahead = [a for a in AHEAD if ("plain", a) in recall]
    return Report(
        perplexity=base,
        dense=dense,
        recall_plain={a: recall["plain", a] for a in ahead},
        recall_normed={a: recall["normed", a] for a in ahead},
        reuse=routing.mean("reuse"),
        reuse_chance=routing.mean("chance"),
        load_max=routing.mean("max"),
        load_min=routing.mean("min"),
        load_entropy=routing.mean("entropy"),
        top_weight=float(weights[..., 0].mean()),
        importance_06=float((s <= 0.6).mean()),
        importance_09=float((s <= 0.9).mean()),
        quantiles=[float(q) for q in np.quantile(s, [0.25, 0.5, 0.75, 0.9, 0.95])],
        pearson=routing.mean("pearson"),
        pearson_share=routing.mean("pearson_share"),
        drops=[(limit, float((s > limit).mean()), value / base - 1) for limit, value in zip(limits, changed)],
    )
