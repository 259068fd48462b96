"""Error feedback: the inputs that `hobbit imatrix` keeps, the moments made of them, and what `hobbit convert` makes of these."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hobbit_cpp.convert import ConvertError, convert, writer
from hobbit_cpp.convert.ggtypes import TypeInfo, load_types
from hobbit_cpp.convert.imatrix import Imatrix
from hobbit_cpp.convert.moments import DAMPING, PRIOR, Moments, factor_of
from hobbit_cpp.convert.plan import LOW_PREFIX, Output, Tensor
from hobbit_cpp.convert.quantise import Quantiser
from hobbit_cpp.errors import ParameterError
from hobbit_cpp.imatrix import record_imatrix, spread
from models import tiny, tiny_architecture
from test_imatrix import write_gguf
from test_record_imatrix import CONTEXT, TEXT, read
from tiny_models import write_tiny

Floats = npt.NDArray[np.float64]
# of a layer: names of tensors, inputs, experts chosen
Samples = List[Tuple[List[str], Floats, npt.NDArray[np.int32]]]


def samples_of(path: Path) -> Samples:
    """By the reader of llama.cpp's own Python package."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data for t in reader.tensors}
    keys = [key for key in reader.fields if key.startswith("hobbit.inputs.")]
    return [(reader.fields[k].contents(), tensors[k].astype(np.float64), tensors[k.replace("inputs", "selected")]) for k in keys]


def record(model: Path, out: Path, **options: Any) -> Samples:
    record_imatrix(model, TEXT, out, **{"n_tokens": 130, "context": CONTEXT, "expert_cache": "50%", "threads": 2, **options})
    return samples_of(out)


# ---- what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gemma4", "gpt-oss", "deepseek2", "grovemoe"])
def test_the_inputs_are_those_of_the_sums(name: str, tmp_path: Path) -> None:
    """Of the tensors whose sums could be made of them: all but the last of each expert."""
    path = tiny(name) if name in ("mixtral", "qwen3moe") else tiny_architecture(name)
    samples = record(path, tmp_path / "i")
    sums = read(tmp_path / "i")
    assert {n for names, _, _ in samples for n in names} == {n for n in sums if "_down_" not in n}
    for names, x, selected in samples:
        assert len(x) == len(selected) == 130
        for tensor in names:
            expected, counts = sums[tensor]
            for expert in range(len(counts)):
                chosen = (selected == expert).sum(axis=1)
                assert chosen.sum() == counts[expert]
                np.testing.assert_allclose(chosen @ x**2, expected[expert], rtol=4e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("n_ff", [128, 256, 512])
def test_with_one_expert_a_token_what_it_has_computed_is_not_an_input_of_the_layer(n_ff: int, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    write_tiny(model, "mixtral", n_layer=2, n_expert=4, n_expert_used=1, n_ff_exp=n_ff)
    for names, x, selected in record(model, tmp_path / "i", expert_cache="100%"):
        assert len(names) == 2 and not any("_down_" in name for name in names)
        assert x.shape == (130, 256) and selected.shape == (130, 1) and (np.abs(x).max(axis=1) > 0).all()


def test_what_is_interrupted_or_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        assert [p.name.split(".partial")[0] for p in tmp_path.iterdir()] == ["i"]
        if done > CONTEXT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tiny("mixtral"), tmp_path / "i", progress=stop)
    assert not list(tmp_path.iterdir())

    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hobbit_cpp._imatrix_file.write_fully", full)
    with pytest.raises(ConvertError, match="the disk became full"):
        record(tiny("mixtral"), tmp_path / "i")
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(ConvertError, match="not enough space in"):
        record(tiny("mixtral"), tmp_path / "i")
    assert not list(tmp_path.iterdir())


def test_inputs_that_each_expert_has_for_itself_are_not_kept(tmp_path: Path) -> None:
    assert record(tiny_architecture("llama4"), tmp_path / "i") == []


def test_some_of_the_tokens(tmp_path: Path) -> None:
    (_, every, _), *_ = record(tiny("mixtral"), tmp_path / "all")
    (_, some, chosen), *_ = record(tiny("mixtral"), tmp_path / "some", inputs=60, batch=7)
    # of three sequences of a context and less the first, and the beginning of the second
    np.testing.assert_allclose(some, np.concatenate([every[:CONTEXT], every[CONTEXT:60]]), rtol=1e-2, atol=1e-2)
    assert len(chosen) == 60
    assert record(tiny("mixtral"), tmp_path / "none", inputs=0) == []
    with pytest.raises(ParameterError, match="-1"):
        record(tiny("mixtral"), tmp_path / "less", inputs=-1)


@given(lens=st.lists(st.integers(1, 20), max_size=20), most=st.integers(0, 200))
def test_tokens_are_taken_from_all_over_the_text(lens: List[int], most: int) -> None:
    taken = spread(lens, most)
    assert len(taken) == len(lens) and all(0 <= t <= n for t, n in zip(taken, lens))
    assert sum(taken) <= most
    if most >= sum(lens):
        assert taken == lens
    if len(set(lens)) == 1:
        assert sum(taken) == min(most, sum(lens))
        used = [i for i, t in enumerate(taken) if t]
        gaps = np.diff([*used, len(lens)]) if used else np.array([1])
        assert gaps.max() - gaps.min() <= 1


# ---- moments -------------------------------------------------------------------------------------------------


class Given:
    def __init__(self, x: npt.NDArray[Any], selected: npt.NDArray[Any]) -> None:
        self.x, self.ids, self.reads = x.astype(np.float16), selected.astype(np.int32), 0

    def inputs(self) -> npt.NDArray[np.float16]:
        self.reads += 1
        return self.x

    def selected(self) -> npt.NDArray[np.int32]:
        return self.ids


def correlated(n: int, columns: int, seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(1).standard_normal((columns // 8, columns))
    return (rng.standard_normal((n, columns // 8)) @ directions + 0.5 * rng.standard_normal((n, columns))).astype(np.float32)


def test_a_factor_is_that_of_an_experts_own_moments_and_the_layers() -> None:
    x = correlated(400, 64, 2).astype(np.float16).astype(np.float32)
    selected = np.arange(400)[:, None] % 4 + np.array([0, 1])  # expert 4: with 3; 5: never
    moments = Moments({"a": Given(x, selected), "b": Given(np.zeros((9, 64)), np.zeros((9, 1)))})
    layer = x.T @ x / len(x)
    for expert in (0, 4, 5):
        own = x[(selected == expert).any(axis=1)]
        assert len(own) == {0: 100, 4: 100, 5: 0}[expert]
        h = (own.T @ own + PRIOR * layer) / (len(own) + PRIOR)
        h = h / np.trace(h) * 64 + DAMPING * np.eye(64)
        factor = moments.factor("a", expert)
        assert factor is not None and not np.tril(factor, -1).any() and (np.diag(factor) > 0).all()
        np.testing.assert_allclose(factor @ factor.T, h, atol=1e-3 * np.abs(h).max())
    assert moments.factor("b", 0) is None and moments.factor("c", 0) is None


def test_what_is_shared_is_read_and_made_once() -> None:
    source = Given(correlated(50, 32, 3), np.zeros((50, 1)))
    moments = Moments({"up": source, "gate": source})
    assert moments.factor("up", 0) is moments.factor("gate", 0)
    assert source.reads == 1
    assert moments.group("up") == moments.group("gate") is not None and moments.group("down") is None


def test_tensors_with_the_same_inputs_are_gone_through_expert_by_expert() -> None:
    f16 = load_types().by_name["F16"]
    up, gate, down = names = ["blk.0.up", "blk.0.gate", "blk.0.down"]
    outputs = [Output(n, Tensor(n, (writer.CHUNK_ELEMENTS, 2, 3), f16), f16, "high") for n in names]

    def found(group: Any) -> List[List[Tuple[str, int]]]:
        return [[(c.source.name, c.first_row) for c in item] for item in writer.work(outputs, group)]

    alone = [[(n, row)] for n in names for row in range(6)]
    assert found(lambda t: None) == alone
    together = [[(n, 2 * expert + row) for n in (up, gate) for row in range(2)] for expert in range(3)]
    assert found(lambda t: None if t.name == down else 7) == together + alone[12:]


# ---- quantising ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IQ4_NL", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "IQ3_XXS"])
def test_products_of_other_inputs_lose_less(name: str) -> None:
    kind, quantiser = load_types().by_name[name], Quantiser()
    quantiser.prepare(kind)
    x, other = correlated(2000, 512, 4), correlated(500, 512, 5)
    w = (0.02 * np.random.default_rng(6).standard_normal((40, 512))).astype(np.float32)

    def lost(data: npt.NDArray[np.uint8]) -> float:
        back = np.empty(w.size, np.float32)
        quantiser.to_float(kind, data, back, "")
        return float(((other @ (w - back.reshape(w.shape)).T) ** 2).sum())

    plain, better = (np.empty(len(w) * kind.row_bytes(512), np.uint8) for _ in range(2))
    quantiser.quantise(kind, w.ravel(), plain, 512, "", (x**2).mean(axis=0))
    factor = factor_of(x[:, ::-1].T @ x[:, ::-1])
    assert factor is not None
    quantiser.quantise_feedback(kind, w.ravel(), better, "", factor)
    assert lost(better) < 0.8 * lost(plain)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_what_is_no_factor_is_refused(bad: float) -> None:
    kind: TypeInfo = load_types().by_name["Q4_0"]
    factor = np.eye(32, dtype=np.float32)
    factor[3, 3] = bad
    with pytest.raises(ConvertError, match="row 3 of the factor"):
        Quantiser().quantise_feedback(kind, np.ones(32, np.float32), np.empty(18, np.uint8), "w", factor)


# ---- converting ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("feedback") / "i.gguf"
    record(tiny("mixtral"), out)
    return out


def low_tensors(path: Path) -> Dict[str, npt.NDArray[Any]]:
    return {t.name: t.data for t in gguf.GGUFReader(path).tensors if t.name.startswith(LOW_PREFIX)}


def test_up_and_gate_are_made_by_it(matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "i"
    record_imatrix(tiny("mixtral"), TEXT, plain, n_tokens=130, context=CONTEXT, inputs=0)
    made = {}
    for name, source, threads in (("sums", plain, 2), ("inputs", matrix, 1), ("again", matrix, 3)):
        if name == "again":
            monkeypatch.setattr(writer, "CHUNK_ELEMENTS", 5000)  # parts of experts
        convert(tiny("mixtral"), tmp_path / name, high="Q8_0", low="Q4_0", imatrix=source, threads=threads, progress=False)
        made[name] = low_tensors(tmp_path / name)
    for name, data in made["inputs"].items():
        assert np.array_equal(data, made["again"][name])
        assert np.array_equal(data, made["sums"][name]) is ("_down_" in name)
    high = [{t.name: t.data for t in gguf.GGUFReader(tmp_path / n).tensors} for n in ("sums", "inputs")]
    up = "blk.0.ffn_up_exps.weight"
    assert np.array_equal(high[0][up], high[1][up])  # with 8 bits there is nothing to make good


def damaged(source: Path, to: Path, change: Any) -> Path:
    """The same file, but for what `change` does to its tensors and the lists of names."""
    reader = gguf.GGUFReader(source)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    names = {k: f.contents() for k, f in reader.fields.items() if k.startswith("hobbit.inputs.")}
    change(tensors, names)
    return write_gguf(to, {}, names, **tensors)


def replace(name: str, by: Any) -> Any:
    return lambda tensors, _: tensors.update({name: by(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("hobbit.selected.0"), "hobbit.inputs.0 is not a sample of inputs: make it again"),
        (replace("hobbit.inputs.1", lambda x: x.astype(np.float32)), "hobbit.inputs.1 is not a sample"),
        (replace("hobbit.selected.0", lambda x: x[:-1]), "hobbit.inputs.0 is not a sample"),
        (replace("hobbit.inputs.0", lambda x: x[:, :-8]), "is of another model"),
        (replace("hobbit.inputs.0", lambda x: np.where(x == x.max(), np.inf, x).astype(np.float16)), "not finite"),
    ],
)
def test_a_damaged_sample_is_a_clear_error(change: Any, message: str, matrix: Path, tmp_path: Path) -> None:
    bad = damaged(matrix, tmp_path / "bad", change)
    with pytest.raises(ConvertError, match=message):
        convert(tiny("mixtral"), tmp_path / "out.gguf", low="Q4_0", imatrix=bad, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_sample_of_tensors_that_the_model_does_not_have_is_none(matrix: Path, tmp_path: Path) -> None:
    def rename(_: Any, names: Dict[str, List[str]]) -> None:
        names.update((key, [f"other.{n}" for n in of]) for key, of in names.items())

    other = damaged(matrix, tmp_path / "other", rename)
    record_imatrix(tiny("mixtral"), TEXT, tmp_path / "sums", n_tokens=130, context=CONTEXT, inputs=0)
    made = []
    for source in (other, tmp_path / "sums", matrix):
        convert(tiny("mixtral"), tmp_path / "out.gguf", low="Q4_0", imatrix=source, progress=False, force=True)
        made.append({n: data.tobytes() for n, data in low_tensors(tmp_path / "out.gguf").items()})
    assert made[0] == made[1] != made[2]


def test_a_sample_of_what_is_no_expert_tensor_is_passed_over(matrix: Path, tmp_path: Path) -> None:
    def add(_: Any, names: Dict[str, List[str]]) -> None:
        names["hobbit.inputs.0"].insert(0, "blk.0.attn_q.weight")

    other = damaged(matrix, tmp_path / "other", add)
    for source, out in ((other, "a"), (matrix, "b")):
        convert(tiny("mixtral"), tmp_path / out, low="Q4_0", imatrix=source, progress=False)
    a, b = ({n: d.tobytes() for n, d in low_tensors(tmp_path / out).items()} for out in "ab")
    assert a == b


def test_a_truncated_file_is_a_clear_error(matrix: Path, tmp_path: Path) -> None:
    data = matrix.read_bytes()
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConvertError, match="truncated"):
        Imatrix(tmp_path / "short")


def test_two_layers_are_in_memory() -> None:
    class Given:
        def inputs(self) -> Any:
            return np.random.default_rng(0).standard_normal((20, 32)).astype(np.float16)

        def selected(self) -> Any:
            return np.zeros((20, 1), np.int32)

    moments = Moments({str(i): Given() for i in range(5)})
    for i in range(5):
        assert moments.factor(str(i), 0) is not None
    assert len(moments._layers) <= 2
