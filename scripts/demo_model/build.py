"""Presets, and the way from a dense model to the figures of the experts model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import gguf
import numpy as np

from . import evaluate, progress, text, write
from .moe_fit import Recipe, fit_layer
from .transformer import IntArray, Model, attend, rms_norm, run_dense

#: Tokens of a sequence.
LENGTH = 512


@dataclass(frozen=True)
class Preset:
    """What to build: layers (None: all), tokens to fit on, sequences held out."""

    recipe: Recipe
    tokens: int
    held_out: int
    layers: Optional[int] = None
    embedding: Optional[str] = None


PRESETS = {
    # The vocabulary alone is 28 M weights: four bits keep the file small.
    "tiny": Preset(Recipe(8, 128, 2, 0.65), 4096, 2, layers=4, embedding="Q4_0"),
    "demo": Preset(Recipe(8, 768, 2, 0.55, sweep_ridge=0.05), 49152, 8),
    "bench": Preset(Recipe(64, 768, 4, 0.5), 163840, 8),
}


def build(dense: Model, preset: Preset, ids: IntArray, kind: str, path: Path, seed: int) -> None:
    """Fit the layers one after the other and write each when it is done.

    Each is fitted on the hidden states of the experts model made so far, so that it
    sees the inputs that it will get.

    Args:
        ids: calibration tokens, (sequences, length)
    """
    shape = dense.shape
    layers = preset.layers or shape.n_layer
    stored = gguf.GGMLQuantizationType[kind]
    embedding = gguf.GGMLQuantizationType[preset.embedding or kind]
    writer = write.MoeWriter(path, dense, preset.recipe, layers, stored, embedding)
    rng = np.random.default_rng(seed)
    h = dense.tensor("token_embd.weight")[ids]
    flat = h.reshape(-1, shape.n_embd)
    with progress.steps("fitting layers", layers) as step:
        for layer in range(layers):
            attend(h, dense.attention(layer), shape)
            norm = dense.tensor(f"blk.{layer}.ffn_norm.weight")
            ffn = dense.dense(layer)
            # The next layers see the states normalised: an error counts relative to
            # their size. Without this the few huge first tokens rule the fit.
            size = np.sqrt(np.einsum("ij,ij->i", flat, flat) / shape.n_embd)
            weight = 1.0 / np.maximum(size, np.float32(1e-3))
            weight /= weight.mean()
            x = rms_norm(flat, norm, shape.eps)
            fitted = fit_layer(x, ffn, preset.recipe, rng, weight)
            flat += fitted.output
            writer.layer(ffn, fitted)
            step(layer)
    writer.close()


def make(
    preset: Preset, source: Path, out: Path, corpus: Optional[Path] = None, kind: str = "Q8_0", seed: int = 0
) -> evaluate.Report:
    """Build a model, write it to ``out`` and measure it on text kept out of the fit.

    Args:
        preset: what to build
        source: the dense model
        out: GGUF file, put in place when whole
        corpus: text file; None for what comes with Python
        kind: ``F16`` or ``Q8_0``
        seed: starts the clustering
    """
    begin = time.monotonic()
    dense = Model(source)
    if corpus is None:
        # About four characters a token; half as many again for the held-out part.
        prose = text.default_text(preset.tokens * 6 + 100_000)
    else:
        prose = corpus.read_text(encoding="utf-8", errors="replace")
    tokenizer = text.Tokenizer(dense.field("tokenizer.ggml.tokens"), dense.field("tokenizer.ggml.merges"))
    ids, held = text.split(tokenizer.encode(prose), LENGTH, preset.tokens // LENGTH, preset.held_out)
    recipe = preset.recipe
    print(
        f"{recipe.n_expert} experts of {recipe.n_ff} neurons, top {recipe.top_k}; "
        f"{ids.size} tokens to fit on, {held.size} held out",
        flush=True,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".part")
    try:
        build(dense, preset, ids, kind, unfinished, seed)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    built = time.monotonic() - begin
    model = Model(out)
    layers = model.shape.n_layer
    with progress.steps("measuring", 3 * layers) as step:
        reference = run_dense(dense, held, layers, step)
        report = evaluate.evaluate(model, held, reference, lambda i: step(i + layers))
    print("\n".join(report.lines()))
    size = out.stat().st_size / 1e9
    print(f"{out}: {size:.2f} GB; built in {built:.0f} s, measured in {time.monotonic() - begin - built:.0f} s")
    return report
