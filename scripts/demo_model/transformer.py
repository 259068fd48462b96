"""Forward pass of llama-architecture models (dense or experts) in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional

import gguf
import numpy as np
import numpy.typing as npt

from . import parallel

if TYPE_CHECKING:
    from pathlib import Path

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters; ``n_expert`` is 0 for a dense model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    rope_base: float
    eps: float
    n_expert: int = 0
    top_k: int = 0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Attention:
    """Attention weights of one layer, matrices as (out, in)."""

    norm: FloatArray
    q: FloatArray
    k: FloatArray
    v: FloatArray
    out: FloatArray


@dataclass(frozen=True)
class FeedForward:
    """SwiGLU weights: gate and up (n_ff, n_embd), down (n_embd, n_ff)."""

    gate: FloatArray
    up: FloatArray
    down: FloatArray


@dataclass(frozen=True)
class Experts:
    """Router (n_expert, n_embd) and experts with a leading expert axis."""

    router: FloatArray
    experts: list[FeedForward]
    top_k: int


class Model:
    """A GGUF file whose tensors are dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        arch = self.field("general.architecture")
        if arch != "llama":
            raise ValueError(f"{path}: architecture {arch!r}, expected 'llama'")
        n_head = int(self.field("llama.attention.head_count"))
        self.shape = Shape(
            n_layer=int(self.field("llama.block_count")),
            n_embd=int(self.field("llama.embedding_length")),
            n_head=n_head,
            n_head_kv=int(self.field("llama.attention.head_count_kv", n_head)),
            n_ff=int(self.field("llama.feed_forward_length")),
            rope_base=float(self.field("llama.rope.freq_base", 10000.0)),
            eps=float(self.field("llama.attention.layer_norm_rms_epsilon")),
            n_expert=int(self.field("llama.expert_count", 0)),
            top_k=int(self.field("llama.expert_used_count", 0)),
        )

    def field(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key."""
        field = self.reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise ValueError(f"{self.path}: no metadata key {key!r}")
        return default

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self._tensors

    def raw(self, name: str) -> gguf.ReaderTensor:
        """The tensor as stored."""
        return self._tensors[name]

    def tensor(self, name: str) -> FloatArray:
        """The tensor in float32, slowest axis first."""
        raw = self._tensors[name]
        return dequantize(raw.data, raw.tensor_type)

    def attention(self, layer: int) -> Attention:
        """Attention weights of a layer."""
        names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
        return Attention(*(self.tensor(f"blk.{layer}.{n}.weight") for n in names))

    def dense(self, layer: int) -> FeedForward:
        """Dense feed-forward weights of a layer."""
        names = ("ffn_gate", "ffn_up", "ffn_down")
        return FeedForward(*(self.tensor(f"blk.{layer}.{n}.weight") for n in names))

    def experts(self, layer: int) -> Experts:
        """Router and experts of a layer."""
        names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        stacks = [self.tensor(f"blk.{layer}.{n}.weight") for n in names]
        return Experts(
            router=self.tensor(f"blk.{layer}.ffn_gate_inp.weight"),
            experts=[FeedForward(*parts) for parts in zip(*stacks)],
            top_k=self.shape.top_k,
        )


def dequantize(data: npt.NDArray[Any], kind: gguf.GGMLQuantizationType) -> FloatArray:
    """Float32 values of stored tensor data."""
    return np.asarray(gguf.quants.dequantize(data, kind), dtype=np.float32)


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """RMSNorm over the last axis of ``x``, (..., n_embd)."""
    scale = np.einsum("...i,...i->...", x, x) / np.float32(x.shape[-1])
    out: FloatArray = x * (1.0 / np.sqrt(scale + np.float32(eps)))[..., None]
    out *= weight
    return out


def rope_tables(shape: Shape, length: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of the rotation, (length, head_dim / 2) each."""
    half = shape.head_dim // 2
    freq = shape.rope_base ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(length)[:, None] * freq
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: FloatArray, cos: FloatArray, sin: FloatArray) -> FloatArray:
    """Rotate neighbouring pairs of (..., length, heads, head_dim).

    llama.cpp stores q and k of this architecture permuted for just this pairing.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[:, None, :], sin[:, None, :]
    out = np.empty_like(x)
    out[..., 0::2] = even * c - odd * s
    out[..., 1::2] = even * s + odd * c
    return out


def attend(h: FloatArray, weights: Attention, shape: Shape) -> None:
    """Add causal attention to ``h`` in place, (sequences, length, n_embd)."""
    n_seq, length, _ = h.shape
    n_kv, dim = shape.n_head_kv, shape.head_dim
    group = shape.n_head // n_kv
    cos, sin = rope_tables(shape, length)
    scale = np.float32(dim**-0.5)
    # Queries go in blocks that see only the keys before their end: it saves almost
    # half of the scores of a whole square.
    step = max(1, min(128, length))
    mask = np.triu(np.full((step, step), -np.inf, dtype=np.float32), 1)
    at_once = max(1, parallel.BLOCK // length)

    def work(start: int) -> None:
        part = h[start : start + at_once]
        x = rms_norm(part, weights.norm, shape.eps)
        n = len(part)
        q = rotate((x @ weights.q.T).reshape(n, length, -1, dim), cos, sin) * scale
        k = rotate((x @ weights.k.T).reshape(n, length, n_kv, dim), cos, sin)
        v = (x @ weights.v.T).reshape(n, length, n_kv, dim)
        mixed = np.empty((n, length, n_kv, group, dim), dtype=np.float32)
        for i in range(n):
            # (kv, head_dim, length) and (kv, length, head_dim)
            keys = np.ascontiguousarray(k[i].transpose(1, 2, 0))
            values = np.ascontiguousarray(v[i].transpose(1, 0, 2))
            queries = q[i].reshape(length, n_kv, group, dim).transpose(1, 2, 0, 3)
            for lo in range(0, length, step):
                hi = min(lo + step, length)
                block = queries[:, :, lo:hi].reshape(n_kv, -1, dim)
                scores = block @ keys[:, :, :hi]
                grid = scores.reshape(n_kv, group, hi - lo, hi)
                grid[..., lo:] += mask[: hi - lo, : hi - lo]
                scores -= scores.max(-1, keepdims=True)
                np.exp(scores, out=scores)
                total = scores.sum(-1, keepdims=True)
                head = (scores @ values[:, :hi]) / total
                mixed[i, lo:hi] = head.reshape(n_kv, group, hi - lo, dim).transpose(2, 0, 1, 3)
        part += mixed.reshape(n, length, -1) @ weights.out.T

    parallel.each(work, range(0, n_seq, at_once))


def activations(x: FloatArray, ffn: FeedForward) -> FloatArray:
    """Inner SwiGLU activations, (tokens, n_embd) -> (tokens, n_ff)."""
    gate = x @ ffn.gate.T
    inner: FloatArray = x @ ffn.up.T
    inner *= gate
    np.negative(gate, out=gate)
    # A strongly negative gate overflows to inf, and the quotient to the right 0.
    with np.errstate(over="ignore"):
        np.exp(gate, out=gate)
    gate += 1.0
    inner /= gate
    return inner


def add_feed_forward(h: FloatArray, norm: FloatArray, eps: float, ffn: FeedForward) -> None:
    """Add the normalised dense layer to ``h`` in place, (tokens, n_embd)."""

    def work(rows: slice) -> None:
        h[rows] += activations(rms_norm(h[rows], norm, eps), ffn) @ ffn.down.T

    parallel.each(work, parallel.blocks(len(h)))


def select(logits: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Mixtral routing: the k largest logits and their softmax.

    Returns:
        Expert numbers and weights, both (tokens, k), largest weight first.
    """
    top = np.argpartition(-logits, k - 1, axis=-1)[:, :k]
    values = np.take_along_axis(logits, top, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    chosen = np.take_along_axis(top, order, -1)
    values = np.take_along_axis(values, order, -1)
    weights = np.exp(values - values[:, :1])
    weights /= weights.sum(-1, keepdims=True)
    return chosen, weights


def importance(weights: FloatArray) -> FloatArray:
    """Sum of the larger weights of the same token, (tokens, k) sorted weights."""
    return np.cumsum(weights, axis=-1) - weights


def drop(weights: FloatArray, limit: float) -> FloatArray:
    """Zero the selections with ``importance`` > ``limit``, renormalise the rest."""
    kept = np.where(importance(weights) <= limit, weights, np.float32(0))
    kept /= kept.sum(-1, keepdims=True)
    return kept


def expert_outputs(
    x: FloatArray,
    moe: Experts,
    chosen: IntArray,
    weights: FloatArray,
    norms: Optional[FloatArray] = None,
) -> FloatArray:
    """Weighted sum of the chosen experts on (tokens, n_embd).

    ``norms``, (tokens, k), is filled with the norms of the weighted outputs.
    """

    def work(number: int) -> tuple[IntArray, IntArray, FloatArray]:
        ffn = moe.experts[number]
        rows, slots = np.nonzero((chosen == number) & (weights > 0))
        y = activations(x[rows], ffn) @ ffn.down.T
        y *= weights[rows, slots, None]
        return rows, slots, y

    out = np.zeros_like(x)
    for rows, slots, y in parallel.each(work, range(len(moe.experts))):
        if norms is not None:
            norms[rows, slots] = np.sqrt(np.einsum("ij,ij->i", y, y))
        # A token selects an expert at most once, so that no row repeats.
        out[rows] += y
    return out


def log_likelihood(h: FloatArray, ids: IntArray, model: Model) -> float:
    """Summed log-likelihood of the tokens after the first of each sequence.

    Args:
        h: hidden states after the last layer, (sequences, length, n_embd)
        ids: the tokens, (sequences, length)
    """
    embedding = model.tensor("token_embd.weight")
    output = model.tensor("output.weight") if model.has("output.weight") else embedding
    norm = model.tensor("output_norm.weight")

    def work(i: int) -> float:
        logits = rms_norm(h[i, :-1], norm, model.shape.eps) @ output.T
        logits -= logits.max(-1, keepdims=True)
        hit = logits[np.arange(len(logits)), ids[i, 1:]]
        np.exp(logits, out=logits)
        return float((hit - np.log(logits.sum(-1))).sum(dtype=np.float64))

    return sum(parallel.each(work, range(len(h))))


def run_dense(model: Model, ids: IntArray, n_layer: int, step: Callable[[int], None]) -> float:
    """Perplexity of a dense model's first ``n_layer`` layers on (sequences, length)."""
    h = model.tensor("token_embd.weight")[ids]
    flat = h.reshape(-1, model.shape.n_embd)
    for layer in range(n_layer):
        attend(h, model.attention(layer), model.shape)
        norm = model.tensor(f"blk.{layer}.ffn_norm.weight")
        add_feed_forward(flat, norm, model.shape.eps, model.dense(layer))
        step(layer)
    return perplexity(log_likelihood(h, ids, model), ids)


def perplexity(total: float, ids: IntArray) -> float:
    """Perplexity from a summed log-likelihood over (sequences, length)."""
    return float(np.exp(-total / (len(ids) * (ids.shape[1] - 1))))
