"""The hyperparameters of well-known models, as their GGUFs state them, and the tensors that follow from them.

A model is one row of `SHAPES`. Shapes of tensors are in ggml's order: the row length first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Dict, Tuple, Union

__all__ = ["SHAPES", "Shape", "Weight", "metadata", "weights"]

Number = Union[bool, int, float, str]


@dataclass(frozen=True)
class Weight:
    """A tensor: `role` is expert, matrix, embedding, router, norm or bias (the last three are F32)."""

    name: str
    shape: Tuple[int, ...]
    role: str = "matrix"


@dataclass(frozen=True)
class Shape:
    """A model."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff_exp: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    rms_eps: float
    attention: Callable[[Shape], Iterator[Weight]]
    """Of one layer, norms included, names without `blk.N.`"""
    experts: str = "Q4_K"
    """Type that its files usually have the experts in."""
    head: int = 128
    """Elements of an attention head."""
    n_ff_shared: int = 0
    shared_gate: bool = False
    n_ff_dense: int = 0
    dense_layers: int = 0
    expert_biases: bool = False
    ffn_norm: str = "ffn_norm.weight"
    more: Dict[str, Number] = field(default_factory=dict)
    """Further metadata, without the architecture's prefix."""


def _norm(name: str, n: int) -> Weight:
    return Weight(f"{name}.weight", (n,), "norm")


def _grouped(s: Shape) -> Iterator[Weight]:
    """Grouped-query attention."""
    yield _norm("attn_norm", s.n_embd)
    yield Weight("attn_q.weight", (s.n_embd, s.n_head * s.head))
    yield Weight("attn_k.weight", (s.n_embd, s.n_head_kv * s.head))
    yield Weight("attn_v.weight", (s.n_embd, s.n_head_kv * s.head))
    yield Weight("attn_output.weight", (s.n_head * s.head, s.n_embd))


def _grouped_with_biases(s: Shape) -> Iterator[Weight]:
    yield from _grouped(s)
    yield Weight("attn_q.bias", (s.n_head * s.head,), "bias")
    yield Weight("attn_k.bias", (s.n_head_kv * s.head,), "bias")
    yield Weight("attn_v.bias", (s.n_head_kv * s.head,), "bias")


def _with_sinks(s: Shape) -> Iterator[Weight]:
    yield from _grouped_with_biases(s)
    yield Weight("attn_output.bias", (s.n_embd,), "bias")
    yield Weight("attn_sinks.weight", (s.n_head,), "bias")


def _with_head_norms(s: Shape) -> Iterator[Weight]:
    """Queries and keys normalised per head."""
    yield from _grouped(s)
    yield _norm("attn_q_norm", s.head)
    yield _norm("attn_k_norm", s.head)


def _with_whole_norms(s: Shape) -> Iterator[Weight]:
    """Queries and keys normalised over all heads."""
    yield from _grouped(s)
    yield _norm("attn_q_norm", s.n_head * s.head)
    yield _norm("attn_k_norm", s.n_head_kv * s.head)


_KV_RANK, _ROPE, _NOPE, _VALUE = 512, 64, 128, 128


def _latent(s: Shape) -> Iterator[Weight]:
    """DeepSeek-V2-Lite's latent attention: keys and values compressed, queries not."""
    yield _norm("attn_norm", s.n_embd)
    yield Weight("attn_q.weight", (s.n_embd, s.n_head * (_NOPE + _ROPE)))
    yield Weight("attn_kv_a_mqa.weight", (s.n_embd, _KV_RANK + _ROPE))
    yield _norm("attn_kv_a_norm", _KV_RANK)
    yield Weight("attn_k_b.weight", (_NOPE, _KV_RANK, s.n_head))
    yield Weight("attn_v_b.weight", (_KV_RANK, _VALUE, s.n_head))
    yield Weight("attn_output.weight", (s.n_head * _VALUE, s.n_embd))


_HEADS_128: Dict[str, Number] = {"attention.key_length": 128, "attention.value_length": 128}

SHAPES: Dict[str, Shape] = {
    "qwen3-30b-a3b": Shape(
        "qwen3moe", 48, 2048, 32, 4, 768, 128, 8, 151936, 40960, 1e6, 1e-6, _with_head_norms,
        more={**_HEADS_128, "feed_forward_length": 6144, "expert_feed_forward_length": 768},
    ),
    "mixtral-8x7b": Shape(
        "llama", 32, 4096, 32, 8, 14336, 8, 2, 32000, 32768, 1e6, 1e-5, _grouped,
        more={"feed_forward_length": 14336, "rope.dimension_count": 128},
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss", 24, 2880, 64, 8, 2880, 32, 4, 201088, 131072, 150000.0, 1e-5, _with_sinks,
        experts="MXFP4", head=64, expert_biases=True, ffn_norm="post_attention_norm.weight",
        more={
            "feed_forward_length": 2880, "expert_feed_forward_length": 2880, "attention.key_length": 64,
            "attention.value_length": 64, "attention.sliding_window": 128, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        },
    ),
    "olmoe": Shape(
        "olmoe", 16, 2048, 16, 16, 1024, 64, 8, 50304, 4096, 10000.0, 1e-5, _with_whole_norms,
        more={"feed_forward_length": 1024},
    ),
    "deepseek-v2-lite": Shape(
        # Latent attention is stored as attention with a single wide key head.
        "deepseek2", 27, 2048, 16, 1, 1408, 64, 6, 102400, 163840, 10000.0, 1e-6, _latent,
        n_ff_shared=2816, n_ff_dense=10944, dense_layers=1,
        more={
            "attention.q_lora_rank": 0, "attention.kv_lora_rank": _KV_RANK, "attention.key_length": _KV_RANK + _ROPE,
            "attention.value_length": _KV_RANK, "attention.key_length_mla": _NOPE + _ROPE,
            "attention.value_length_mla": _VALUE, "rope.dimension_count": _ROPE, "feed_forward_length": 10944,
            "leading_dense_block_count": 1, "expert_feed_forward_length": 1408, "expert_shared_count": 2,
            "expert_weights_scale": 1.0, "expert_weights_norm": False, "expert_gating_func": 1,
            "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
    ),
    "qwen1.5-moe": Shape(
        "qwen2moe", 24, 2048, 16, 16, 1408, 60, 4, 151936, 8192, 1e6, 1e-6, _grouped_with_biases,
        n_ff_shared=5632, shared_gate=True,
        more={
            "feed_forward_length": 5632, "expert_feed_forward_length": 1408, "expert_shared_feed_forward_length": 5632,
        },
    ),
}  # fmt: skip


def metadata(s: Shape, n_layer: int) -> Dict[str, Number]:
    """The keys of the architecture, with their prefix."""
    common: Dict[str, Number] = {
        "block_count": n_layer,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.layer_norm_rms_epsilon": s.rms_eps,
        "rope.freq_base": s.rope_base,
        "vocab_size": s.n_vocab,
        "expert_count": s.n_expert,
        "expert_used_count": s.n_expert_used,
    }
    return {f"{s.arch}.{key}": value for key, value in {**common, **s.more}.items()}


def weights(s: Shape, n_layer: int) -> Iterator[Weight]:
    """All tensors, in the order of the file."""
    yield Weight("token_embd.weight", (s.n_embd, s.n_vocab), "embedding")
    yield _norm("output_norm", s.n_embd)
    yield Weight("output.weight", (s.n_embd, s.n_vocab))
    for i in range(n_layer):
        for weight in (*s.attention(s), Weight(s.ffn_norm, (s.n_embd,), "norm"), *_feed_forward(s, i)):
            yield Weight(f"blk.{i}.{weight.name}", weight.shape, weight.role)


def _feed_forward(s: Shape, layer: int) -> Iterator[Weight]:
    if layer < s.dense_layers:
        yield from _swiglu(s, "", s.n_ff_dense)
        return
    yield Weight("ffn_gate_inp.weight", (s.n_embd, s.n_expert), "router")
    for name, n_in, n_out in (
        ("gate", s.n_embd, s.n_ff_exp),
        ("up", s.n_embd, s.n_ff_exp),
        ("down", s.n_ff_exp, s.n_embd),
    ):
        yield Weight(f"ffn_{name}_exps.weight", (n_in, n_out, s.n_expert), "expert")
        if s.expert_biases:
            yield Weight(f"ffn_{name}_exps.bias", (n_out, s.n_expert), "bias")
    if s.expert_biases:
        yield Weight("ffn_gate_inp.bias", (s.n_expert,), "bias")
    if s.n_ff_shared:
        yield from _swiglu(s, "_shexp", s.n_ff_shared)
    if s.shared_gate:
        yield Weight("ffn_gate_inp_shexp.weight", (s.n_embd,), "router")


def _swiglu(s: Shape, suffix: str, n_ff: int) -> Iterator[Weight]:
    yield Weight(f"ffn_gate{suffix}.weight", (s.n_embd, n_ff))
    yield Weight(f"ffn_up{suffix}.weight", (s.n_embd, n_ff))
    yield Weight(f"ffn_down{suffix}.weight", (n_ff, s.n_embd))
