"""Tiny random expert models for tests: ``python tests/python/tiny_models.py OUTDIR``.

A model family is one row of ``SHAPES``: a function from the sizes to metadata and to
the tensors of each layer. Vocabulary, weights and writing are shared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import gguf
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Value = Union[bool, int, float, str]
Metadata = Dict[str, Value]

N_HEAD = 4
CONTEXT = 512
WORDS = ("the", "and", "of", "to", "in", "is", "that", "expert", "layer", "token")


@dataclass(frozen=True)
class Sizes:
    """What a shape may choose its tensors by."""

    n_layer: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff_exp: int


@dataclass(frozen=True)
class Tensor:
    """A random tensor.

    Attributes:
        name: without ``blk.N.``
        shape: slowest axis first, so a matrix is (out, in)
        role: ``matrix``, ``expert`` (a stack in the asked-for type), ``router``,
            ``norm`` or ``bias`` (these three in F32)
        scale: factor on the usual standard deviation
    """

    name: str
    shape: tuple[int, ...]
    role: str = "matrix"
    scale: float = 1.0


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


def _vocabulary() -> tuple[List[str], List[float], List[int]]:
    """SentencePiece-like tokens, scores and types that can spell any text."""
    kinds = gguf.TokenType
    rows = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    rows += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    space = "\u2581"
    rows += [(c, kinds.NORMAL) for c in [space, *map(chr, range(0x21, 0x7F))]]
    # Merging goes pair by pair, so every prefix of a word is a token too.
    for word in WORDS:
        known = {text for text, _ in rows}
        prefixes = [space + word[:end] for end in range(1, len(word) + 1)]
        rows += [(p, kinds.NORMAL) for p in prefixes if p not in known]
    texts, types = [text for text, _ in rows], [int(kind) for _, kind in rows]
    scores = [-float(i) if kind == kinds.NORMAL else 0.0 for i, kind in enumerate(types)]
    return texts, scores, types


def _values(tensor: Tensor, rng: np.random.Generator) -> FloatArray:
    """Random weights that keep activations of size one."""
    noise = rng.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.role == "norm":
        noise *= np.float32(0.1 * tensor.scale)
        noise += 1.0
        return noise
    # Inputs of the router have size one: logits get a standard deviation of 1.5, so
    # that the largest weights differ clearly.
    gain = {"router": 1.5, "bias": 0.05 * tensor.shape[-1] ** 0.5}.get(tensor.role, 1.0)
    noise *= np.float32(gain * tensor.scale * tensor.shape[-1] ** -0.5)
    return noise


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    values: FloatArray,
    kind: gguf.GGMLQuantizationType,
) -> None:
    """Add a tensor in a storage type."""
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        try:
            data: npt.NDArray[Any] = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            raise ValueError(f"gguf cannot quantise to {kind.name}") from None
        writer.add_tensor(name, data, raw_dtype=kind)


def _add_metadata(writer: gguf.GGUFWriter, prefix: str, metadata: Metadata) -> None:
    for key, value in metadata.items():
        name = f"{prefix}.{key}"
        # bool comes first: it is an int too.
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)


def write_tiny(
    path: Path,
    shape: str,
    *,
    expert_type: str = "F16",
    n_layer: int = 4,
    n_expert: int = 8,
    n_expert_used: int = 2,
    n_embd: int = 256,
    n_ff_exp: int = 256,
    seed: int = 0,
) -> None:
    """Write a random expert model of a few MB that llama.cpp loads.

    Args:
        path: GGUF file to write
        shape: a key of ``SHAPES``
        expert_type: ggml type of the expert stacks, one that gguf can write
        n_layer: layers, counting leading dense ones
        n_expert: experts per layer
        n_expert_used: experts per token
        n_embd: model width; a multiple of 256 lets K-quants fit
        n_ff_exp: neurons of an expert; likewise
        seed: the same seed gives the same file
    """
    family = SHAPES[shape](Sizes(n_layer, n_expert, n_expert_used, n_embd, n_ff_exp))
    kind = gguf.GGMLQuantizationType[expert_type.upper()]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_name(f"tiny {shape}")
    tokens, scores, types = _vocabulary()
    common: Metadata = {
        "block_count": n_layer,
        "context_length": CONTEXT,
        "embedding_length": n_embd,
        "attention.head_count": N_HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "vocab_size": len(tokens),
        "expert_count": n_expert,
        "expert_used_count": n_expert_used,
    }
    _add_metadata(writer, family.arch, {**common, **family.metadata})
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    small = gguf.GGMLQuantizationType.F32
    plain = gguf.GGMLQuantizationType.F16
    # Embeddings have size one per element, unlike the other matrices.
    embedding = Tensor("token_embd.weight", (len(tokens), n_embd), scale=n_embd**0.5)
    tail = [_norm("output_norm", n_embd), Tensor("output.weight", (len(tokens), n_embd))]
    rows = [("", embedding)]
    rows += [(f"blk.{i}.", part) for i in range(n_layer) for part in family.layer(i)]
    rows += [("", part) for part in tail]
    roles = {"matrix": plain, "expert": kind}
    for prefix, tensor in rows:
        storage = roles.get(tensor.role, small)
        _add(writer, prefix + tensor.name, _values(tensor, rng), storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: Optional[List[str]] = None) -> int:
    """Write every shape into a directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--expert-type", default="F16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.outdir.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        path = args.outdir / f"tiny-{shape}-{args.expert_type.lower()}.gguf"
        write_tiny(path, shape, expert_type=args.expert_type, seed=args.seed)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
