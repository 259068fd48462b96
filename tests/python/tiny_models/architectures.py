"""What makes a tiny model of each architecture with routed experts that the pinned llama.cpp knows.

A row says what differs from `common`: metadata, and which of the tensors that llama.cpp would take are left out. The
tensors themselves, with names and shapes, are asked from llama.cpp (`tensors.py`), so nothing here repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

from .content import U64

#: The shape of all of them, unless a row says otherwise: small enough for about 2 MB.
N_LAYER, N_EXPERT, N_USED, N_EMBD, N_FF, N_FF_EXP, N_HEAD = 4, 8, 3, 128, 96, 64, 2
HEAD = N_EMBD // N_HEAD

SOFTMAX, SIGMOID, SOFTMAX_OVER_SELECTED, SQRT_SOFTPLUS = 1, 2, 3, 4


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        metadata: keys without the architecture's prefix; over `common`. None: the key is left out.
        without: regular expression of tensor names (without `blk.N.`) that the file does not have, besides `OPTIONAL`.
        keep: of those that `OPTIONAL` would leave out, what the file has.
        fused: gate and up experts are one tensor, gate_up.
        arch: general.architecture, where the row is a variant and its name another.
        embeddings: the model makes embeddings, no logits.
        types: of the experts, to run it with.
    """

    metadata: Dict[str, Any] = field(default_factory=dict)
    without: str = r"(?!)"
    keep: str = r"(?!)"
    fused: bool = False
    arch: str = ""
    embeddings: bool = False
    types: Tuple[str, str] = ("F16", "Q8_0")


#: Tensors that llama.cpp takes for many architectures and few models have.
OPTIONAL = r"rope_(freqs|factors_long|factors_short)\.weight|.*\.(input_scale|scale)"


def common() -> Dict[str, Any]:
    """Metadata that all rows share; an architecture reads what it knows."""
    return {
        "context_length": 512,
        "embedding_length": N_EMBD,
        "block_count": N_LAYER,
        "feed_forward_length": N_FF,
        "leading_dense_block_count": 1,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base": 10000.0,
        "rope.dimension_sections": [HEAD // 4] * 4,
        "logit_scale": 1.0,
        "expert_count": N_EXPERT,
        "expert_used_count": N_USED,
        "expert_shared_count": 1,
        "expert_feed_forward_length": N_FF_EXP,
        "expert_shared_feed_forward_length": N_FF_EXP,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": True,
        "interleave_moe_layer_step": 1,
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 2 * N_EMBD,
        "ssm.state_size": 128,
        "ssm.time_step_rank": N_HEAD,
        "ssm.group_count": 2,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "shortconv.l_cache": 3,
    }


def _per_layer(*values: Any) -> list[Any]:
    """A value a layer, repeated."""
    return [values[i % len(values)] for i in range(N_LAYER)]


# Multi-head latent attention: stored as attention with one wide key head.
_MLA: Dict[str, Any] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 96,
    "attention.value_length": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 32,
}
# A light indexer beside it chooses what is attended to (here: everything).
_INDEXER: Dict[str, Any] = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 131072,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
    "attention.indexer.kpool_select_tail": True,
}
_HYPER: Dict[str, Any] = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.low_rank": 8,
}
# A hashed n-gram embedding of the tokens, added in the first layer.
_PLE: Dict[str, Any] = {
    "ple.layers": [0],
    "ple.ngram_size": 3,
    "ple.heads_per_ngram": 2,
    "ple.conv_kernel": 4,
    "ple.eos_token_id": 0,
    "ple.layer_multipliers": U64((1, 3, 5)),
    "ple.head_offsets": U64((0, 64, 128, 192)),
    "ple.head_vocab_sizes": U64((64, 64, 64, 64)),
    "embedding_length_per_layer_input": N_EMBD // 4,
    "attention.compress_ratios": _per_layer(4),
}
# Attention in every other layer, recurrent ones between.
_HYBRID: Dict[str, Any] = {
    "attention.head_count": _per_layer(N_HEAD, 0),
    "attention.head_count_kv": _per_layer(N_HEAD, 0),
}

# The recurrent layers are Kimi delta attention.
_KDA: Dict[str, Any] = {
    **_MLA,
    "attention.head_count": _per_layer(1, 0),
    "attention.head_count_kv": _per_layer(1, 0),
    "ssm.time_step_rank": 1,
}

#: By general.architecture, or the name of a variant.
ARCHITECTURES: Dict[str, Architecture] = {
    "llama": Architecture(),
    "llama-expert-scales": Architecture(arch="llama", keep=r"ffn_(gate|up|down)_exps\.scale"),
    "llama4": Architecture({"interleave_moe_layer_step": 2}),
    "llama4-top-1": Architecture({"expert_used_count": 1}, arch="llama4"),
    "grok": Architecture(),
    "dbrx": Architecture({"attention.clamp_kqv": 1.0}),
    "arctic": Architecture(),
    "olmoe": Architecture(),
    "phimoe": Architecture(),
    "qwen2moe": Architecture(),
    "qwen3moe": Architecture(),
    "qwen3vlmoe": Architecture(),
    "qwen3next": Architecture({"ssm.inner_size": 256}),
    "qwen35moe": Architecture({"ssm.inner_size": 256}),
    "qwen4exp": Architecture({**_INDEXER, **_HYPER, **_PLE, "ssm.inner_size": 256, "attention.indexer.key_length": HEAD}),
    "granite": Architecture(),
    "granitemoe": Architecture(),
    "granitehybrid": Architecture(_HYBRID),
    "granite_swa": Architecture({"attention.sliding_window_pattern": _per_layer(0, 1)}),
    "deepseek": Architecture(),
    "deepseek2": Architecture(_MLA),
    "deepseek2-groups": Architecture(
        {**_MLA, "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5}, arch="deepseek2", fused=True
    ),
    "deepseek32": Architecture({**_MLA, **_INDEXER}),
    "deepseek4": Architecture(
        {
            **_INDEXER,
            **_HYPER,
            "attention.head_count_kv": 1,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "rope.dimension_count": HEAD // 2,
            "attention.q_lora_rank": 64,
            "attention.output_group_count": 2,
            "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "hash_layer_count": 1,
            "swiglu_clamp_exp": 10.0,
            "expert_weights_scale": 1.5,
            "expert_gating_func": SQRT_SOFTPLUS,
        }
    ),
    "minicpm": Architecture(),
    "deepseek2-ocr": Architecture(),
    "mistral3": Architecture(),
    "mistral4": Architecture(_MLA),
    "glm4moe": Architecture(),
    "glm4moe-mtp": Architecture({"block_count": N_LAYER + 1, "nextn_predict_layers": 1}, arch="glm4moe"),
    "glm-dsa": Architecture({**_MLA, **_INDEXER}),
    "glm5-next": Architecture(
        {
            **_MLA,
            **_INDEXER,
            **_HYPER,
            **_PLE,
            "attention.head_count": 1,
            "attention.head_count_kv": _per_layer(1, 0),
            "attention.key_length": 64,
            "rope.dimension_count": 0,
        }
    ),
    "exaone-moe": Architecture(),
    "bailingmoe": Architecture(),
    "bailingmoe2": Architecture(),
    "bailingmoe3": Architecture({**_KDA, "rope.dimension_sections": [4, 6, 6, 0]}),
    "dots1": Architecture(),
    "dots3note": Architecture(
        {
            **_MLA,
            **_INDEXER,
            "attention.kv_lora_rank_swa": 64,
            "attention.key_length_swa": 96,
            "attention.value_length_swa": 64,
            "attention.key_length_mla_swa": 64,
            "attention.value_length_mla_swa": 32,
            "rope.freq_base_swa": 10000.0,
            "attention.sliding_window_pattern": _per_layer(0, 1),
            "attention.indexer.types": _per_layer(1, 0),
        }
    ),
    "afmoe": Architecture(),
    "laguna": Architecture(),
    "ernie4_5-moe": Architecture(),
    "hunyuan-moe": Architecture(),
    "hy_v3": Architecture(),
    "hy_v4": Architecture(
        {
            **_MLA,
            **_INDEXER,
            **_HYPER,
            "hyper_connection.magnitude": 2.0,
            "swiglu_clamp_exp": 10.0,
            "attention.indexer.types": _per_layer(1, 0),
        }
    ),
    "gpt-oss": Architecture(types=("F16", "MXFP4")),
    "lfm2moe": Architecture(_HYBRID),
    "smallthinker": Architecture(),
    "llada-moe": Architecture(embeddings=True),
    "rnd1": Architecture(embeddings=True),
    "grovemoe": Architecture({"experts_per_group": 2, "expert_chunk_feed_forward_length": 32, "expert_group_scale": 0.05}),
    "minimax-01": Architecture({"residual_scale": 3.5}),
    "minimax-m2": Architecture(),
    "minimax-m3": Architecture({**_INDEXER, "attention.indexer.head_count": N_HEAD, "rope.dimension_count": 64}),
    "mimo2": Architecture({"attention.sliding_window_pattern": _per_layer(0, 1)}),
    "step35": Architecture({"attention.sliding_window_pattern": _per_layer(0, 1)}),
    "kimi-linear": Architecture({**_KDA}),
    "kimi-k3": Architecture(
        {
            **_KDA,
            "attn_res.block_size": 12,
            "activation.situ_beta": 4.0,
            "activation.situ_linear_beta": 25.0,
            "expert_latent_length": 96,
        }
    ),
    "cohere2moe": Architecture({"attention.sliding_window_pattern": _per_layer(0, 1)}),
    "mellum": Architecture(),
    "maple": Architecture({"attention.sliding_window_pattern": _per_layer(0, 1), "swiglu_clamp_exp": 7.0}),
    "jamba": Architecture(_HYBRID),
    "nemotron_h_moe": Architecture(
        {
            "block_count": 6,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "attention.head_count_kv": [0, 0, N_HEAD, 0, 0, 0],
            "feed_forward_length": [0, N_FF, 0, N_FF, 0, N_FF],
            # Nemotron 3 Puzzle: sizes and numbers of experts that differ from layer to layer.
            "expert_feed_forward_length": [0, N_FF_EXP, 0, 32, 0, N_FF_EXP],
            "expert_used_count": [0, 3, 0, 2, 0, 1],
            "moe_latent_size": 96,
        }
    ),
    "gemma4": Architecture(
        {
            "embedding_length_per_layer_input": N_EMBD // 2,
            "attention.shared_kv_layers": 0,
            "attention.key_length_swa": HEAD,
            "attention.value_length_swa": HEAD,
            "rope.freq_base_swa": 10000.0,
            "attention.sliding_window_pattern": _per_layer(1, 0),
        },
        keep=r"rope_freqs\.weight|ffn_(gate_inp|down_exps|up_exps)\.scale",
        fused=True,
    ),
    "nomic-bert-moe": Architecture({"moe_every_n_layers": 2, "tokenizer.ggml.token_type_count": 1}, embeddings=True),
}
