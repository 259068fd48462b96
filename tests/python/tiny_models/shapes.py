"""Tiny models of any size, tensor by tensor: the shapes that most tests run on.

A model family is one row of ``SHAPES``: a function from the sizes to metadata and to the tensors of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, List

import gguf

from .content import Metadata, Tensor

N_HEAD = 4


@dataclass(frozen=True)
class Sizes:
    """What a shape may choose its tensors by."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff_exp: int


@dataclass(frozen=True)
class Family:
    """Architecture name, its metadata (without prefix) and tensors of layer N."""

    arch: str
    layer: Callable[[int], List[Tensor]]
    metadata: Metadata = field(default_factory=dict)


def _norm(name: str, n: int) -> Tensor:
    return Tensor(f"{name}.weight", (n,), "norm")


def _swiglu(suffix: str, n_embd: int, n_ff: int) -> List[Tensor]:
    """A dense or shared feed-forward layer."""
    return [
        Tensor(f"ffn_gate{suffix}.weight", (n_ff, n_embd)),
        Tensor(f"ffn_up{suffix}.weight", (n_ff, n_embd)),
        Tensor(f"ffn_down{suffix}.weight", (n_embd, n_ff)),
    ]


def _routed(s: Sizes, router_scale: float = 1.0) -> List[Tensor]:
    """Router and expert stacks, named alike in all families."""
    return [
        Tensor("ffn_gate_inp.weight", (s.n_expert, s.n_embd), "router", router_scale),
        Tensor("ffn_gate_exps.weight", (s.n_expert, s.n_ff_exp, s.n_embd), "expert"),
        Tensor("ffn_up_exps.weight", (s.n_expert, s.n_ff_exp, s.n_embd), "expert"),
        Tensor("ffn_down_exps.weight", (s.n_expert, s.n_embd, s.n_ff_exp), "expert"),
    ]


def _grouped_attention(s: Sizes, n_kv: int) -> List[Tensor]:
    """Norms and grouped-query attention with heads of n_embd / N_HEAD."""
    kv = s.n_embd // N_HEAD * n_kv
    return [
        _norm("attn_norm", s.n_embd),
        Tensor("attn_q.weight", (s.n_embd, s.n_embd)),
        Tensor("attn_k.weight", (kv, s.n_embd)),
        Tensor("attn_v.weight", (kv, s.n_embd)),
        Tensor("attn_output.weight", (s.n_embd, s.n_embd)),
        _norm("ffn_norm", s.n_embd),
    ]


def _mixtral(s: Sizes) -> Family:
    return Family(
        "llama",
        lambda _layer: _grouped_attention(s, 2) + _routed(s),
        {
            "attention.head_count_kv": 2,
            "feed_forward_length": s.n_ff_exp,
            "rope.dimension_count": s.n_embd // N_HEAD,
        },
    )


def _qwen3moe(s: Sizes) -> Family:
    head = s.n_embd // N_HEAD

    def layer(_layer: int) -> List[Tensor]:
        heads = [_norm("attn_q_norm", head), _norm("attn_k_norm", head)]
        return _grouped_attention(s, 2) + heads + _routed(s)

    return Family(
        "qwen3moe",
        layer,
        {
            "attention.head_count_kv": 2,
            "attention.key_length": head,
            "attention.value_length": head,
            "feed_forward_length": s.n_ff_exp * s.n_expert_used,
            "expert_feed_forward_length": s.n_ff_exp,
        },
    )


def _deepseek2(s: Sizes) -> Family:
    rope, nope, value, q_rank, kv_rank = 16, 32, 32, 64, 64
    dense_layers = min(1, s.n_layer - 1)
    n_ff = 2 * s.n_ff_exp
    metadata: Metadata = {
        # Latent attention is stored as attention with a single wide key head.
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "rope.dimension_count": rope,
        "feed_forward_length": n_ff,
        "leading_dense_block_count": dense_layers,
        "expert_feed_forward_length": s.n_ff_exp,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
    }
    # llama.cpp scores a group by its two best experts and wants fewer groups used
    # than there are; what is left must still be enough to choose from.
    groups = 4
    if s.n_expert % groups == 0 and s.n_expert >= max(8, 2 * s.n_expert_used):
        metadata["expert_group_count"] = groups
        metadata["expert_group_used_count"] = groups // 2

    def layer(number: int) -> List[Tensor]:
        tensors = [
            _norm("attn_norm", s.n_embd),
            Tensor("attn_q_a.weight", (q_rank, s.n_embd)),
            _norm("attn_q_a_norm", q_rank),
            Tensor("attn_q_b.weight", (N_HEAD * (nope + rope), q_rank)),
            Tensor("attn_kv_a_mqa.weight", (kv_rank + rope, s.n_embd)),
            _norm("attn_kv_a_norm", kv_rank),
            Tensor("attn_k_b.weight", (N_HEAD, kv_rank, nope)),
            Tensor("attn_v_b.weight", (N_HEAD, value, kv_rank)),
            Tensor("attn_output.weight", (s.n_embd, N_HEAD * value)),
            _norm("ffn_norm", s.n_embd),
        ]
        if number < dense_layers:
            return tensors + _swiglu("", s.n_embd, n_ff)
        bias = Tensor("exp_probs_b.bias", (s.n_expert,), "bias")
        # Sigmoid scores are normalised as they are: spread them more than logits.
        routed = _routed(s, router_scale=1.5)
        return [*tensors, *routed, bias, *_swiglu("_shexp", s.n_embd, s.n_ff_exp)]

    return Family("deepseek2", layer, metadata)


#: Every shape that ``write_tiny`` knows.
SHAPES: Dict[str, Callable[[Sizes], Family]] = {
    "mixtral": _mixtral,
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
}
