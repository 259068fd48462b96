"""scripts/pad_hidden_size.py: more channels, the same model."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import pad_hidden_size
from decode import load, logits, words
from hobbit_cpp import Llama
from models import tiny, tiny_dense


@pytest.mark.parametrize(("expert_type", "of_spread"), [("F16", 0.01), ("Q8_0", 0.1)])
def test_computes_the_same(expert_type: str, of_spread: float, tmp_path: Path) -> None:
    source, target = tiny("mixtral", expert_type), tmp_path / "padded.gguf"
    n_embd = int(gguf.GGUFReader(source).fields["llama.embedding_length"].contents())
    assert pad_hidden_size.main([str(source), str(target), "--to", str(2 * n_embd)]) == 0
    shapes = {t.name: [int(n) for n in t.shape] for t in gguf.GGUFReader(target).tensors}
    for tensor in gguf.GGUFReader(source).tensors:
        grown = [a / b for a, b in zip(shapes[tensor.name], (int(n) for n in tensor.shape))]
        assert sorted(grown)[-1] == 2 and sorted(grown)[:-1] == [1] * (len(grown) - 1), tensor.name
    before, after = (load(Llama, str(path), 2) for path in (source, target))
    tokens = words(before, 40)
    expected, found = logits(before, tokens, 40), logits(after, tokens, 40)
    # Another order of sums; with Q8_0 that may round an activation the other way, and here and there a random router errs.
    np.testing.assert_allclose(found, expected, rtol=0, atol=of_spread * expected.std())
    assert np.median(np.abs(found - expected)) < 0.003 * expected.std()
    before.close()
    after.close()


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, to, why in (
        (tiny("qwen3moe"), 4096, "only models of the llama architecture"),
        (tiny_dense(), 8, "already"),
        (tiny("mixtral", "Q8_0"), 1000, "do not divide"),
    ):
        with pytest.raises(SystemExit) as e:
            pad_hidden_size.main([str(source), str(tmp_path / "out.gguf"), "--to", str(to)])
        assert e.value.code == 1 and why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
