"""Write the experts model layer by layer, so that it is never whole in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from pathlib import Path

    from .moe_fit import FittedLayer, Recipe
    from .transformer import FeedForward, FloatArray, Model

F16 = GGMLQuantizationType.F16
F32 = GGMLQuantizationType.F32
Q8_0 = GGMLQuantizationType.Q8_0

_FILE_TYPE = {
    F16: gguf.LlamaFileType.MOSTLY_F16,
    Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def encode(values: FloatArray, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """Values as the file stores them: float16/float32, or bytes of blocks."""
    if kind == F32:
        return np.ascontiguousarray(values, dtype=np.float32)
    if kind == F16:
        return np.ascontiguousarray(values, dtype=np.float16)
    return np.asarray(gguf.quants.quantize(values, kind))


class MoeWriter:
    """GGUF file in the Mixtral layout; tensors must come in the announced order."""

    def __init__(
        self,
        path: Path,
        dense: Model,
        recipe: Recipe,
        layers: int,
        kind: GGMLQuantizationType,
        embed: GGMLQuantizationType,
    ) -> None:
        self._dense, self._recipe, self._kind = dense, recipe, kind
        self._writer = gguf.GGUFWriter(path, "llama")
        self._announced: list[tuple[str, GGMLQuantizationType]] = []
        self._copy_metadata(layers)
        shape = dense.shape
        stack = (recipe.n_expert, recipe.n_ff, shape.n_embd)
        self._announce("token_embd.weight", None, embed)
        for layer in range(layers):
            prefix = f"blk.{layer}."
            self._announce(prefix + "attn_norm.weight", None, F32)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                self._announce(f"{prefix}{name}.weight", None, kind)
            self._announce(prefix + "ffn_norm.weight", None, F32)
            self._announce(prefix + "ffn_gate_inp.weight", (stack[0], stack[2]), F32)
            self._announce(prefix + "ffn_gate_exps.weight", stack, kind)
            self._announce(prefix + "ffn_up_exps.weight", stack, kind)
            down = (stack[0], stack[2], stack[1])
            self._announce(prefix + "ffn_down_exps.weight", down, kind)
        self._announce("output_norm.weight", None, F32)
        if dense.has("output.weight"):
            self._announce("output.weight", None, kind)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._next = 0
        self._copy_until("ffn_gate_inp")

    def _copy_metadata(self, layers: int) -> None:
        recipe, writer = self._recipe, self._writer
        skip = ("GGUF.", "general.", "llama.block_count", "llama.feed_forward_length")
        for key, field in self._dense.reader.fields.items():
            if key.startswith(skip) and key not in ("general.license",):
                continue
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
        size = f"{recipe.n_expert}x{recipe.n_ff}"
        writer.add_type("model")
        writer.add_name(f"SmolLM2 135M Instruct MoE {size} top-{recipe.top_k}")
        writer.add_basename("smollm2-moe")
        writer.add_size_label(size)
        writer.add_file_type(int(_FILE_TYPE[self._kind]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(recipe.n_ff)
        writer.add_expert_count(recipe.n_expert)
        writer.add_expert_used_count(recipe.top_k)

    def _announce(self, name: str, shape: tuple[int, ...] | None, kind: GGMLQuantizationType) -> None:
        """Reserve a tensor; without a shape it is copied from the dense model."""
        if shape is None:
            shape = tuple(int(n) for n in reversed(self._dense.raw(name).shape))
        self._announced.append((name, kind))
        if kind in (F32, F16):
            dtype: np.dtype[Any] = np.dtype(np.float32 if kind == F32 else np.float16)
            size = int(np.prod(shape)) * dtype.itemsize
            self._writer.add_tensor_info(name, shape, dtype, size)
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            size = int(np.prod(stored))
            self._writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, kind)

    def _put(self, data: npt.NDArray[Any]) -> None:
        self._writer.write_tensor_data(data)
        self._next += 1

    def _copy_until(self, stop: str) -> None:
        """Copy announced tensors of the dense model up to one named ``stop``."""
        while self._next < len(self._announced):
            name, kind = self._announced[self._next]
            if stop and stop in name:
                return
            raw = self._dense.raw(name)
            same = raw.tensor_type == kind
            self._put(raw.data if same else encode(self._dense.tensor(name), kind))

    def layer(self, ffn: FeedForward, fitted: FittedLayer) -> None:
        """Write the experts of the next layer and what follows up to the next ones."""
        self._put(fitted.router)
        # Experts share rows of the dense gate and up: quantise once, then gather.
        for dense in (ffn.gate, ffn.up):
            self._put(encode(dense, self._kind)[fitted.neurons])
        self._put(encode(fitted.down, self._kind))
        self._copy_until("ffn_gate_inp")

    def close(self) -> None:
        """Finish the file."""
        if self._next != len(self._announced):
            raise RuntimeError("not all tensors were written")
        self._writer.close()
