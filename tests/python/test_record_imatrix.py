"""hobbit imatrix: the sums agree with those that stock llama.cpp's products get, taken by its own callback."""

from __future__ import annotations

import ctypes
import io
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import gguf
import llama_cpp as c
import numpy as np
import numpy.typing as npt
import pytest

import hobbit_cpp
from hobbit_cpp.cli import main
from hobbit_cpp.convert import ConvertError, convert
from hobbit_cpp.errors import HobbitError, MemoryBudgetError, ParameterError
from hobbit_cpp.imatrix import imatrix_path, record_imatrix
from models import tiny, tiny_architecture

TEXT = "The quick brown fox jumps over the lazy dog, and runs away from all the hunters in the wood; then it sleeps. " * 6
CONTEXT = 48

Sums = Dict[str, Tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]


class Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned ggml."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def strided(t: Tensor, dtype: Any) -> Any:
    """[ne2, ne1, ne0] of a tensor, copied."""
    shape, strides = tuple(t.ne[i] for i in (2, 1, 0)), tuple(t.nb[i] for i in (2, 1, 0))
    n = sum((n - 1) * step for n, step in zip(shape, strides)) + np.dtype(dtype).itemsize
    raw = (ctypes.c_char * n).from_address(t.data)
    return np.ndarray(shape, dtype, raw, strides=strides).copy()


class Stock:
    """llama.cpp as it is, with every expert in memory; what goes into its MUL_MAT_ID is added up."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def see(self, address: int, ask: bool, _: Any) -> bool:
        t = Tensor.from_address(address)
        if not t.src[2] or not t.src[0].contents.name.endswith(b"exps.weight"):
            return not ask  # not of interest; go on
        if not ask:
            weights = t.src[0].contents
            x, ids = strided(t.src[1].contents, np.float32), strided(t.src[2].contents, np.int32)[0]
            n, name = weights.ne[2], weights.name.decode()
            sums, counts = self.sums.setdefault(name, (np.zeros((n, weights.ne[0])), np.zeros(n, np.int64)))
            for token, chosen in enumerate(ids):
                for slot, expert in enumerate(chosen):
                    sums[expert] += x[token, slot % x.shape[1]].astype(np.float64) ** 2
                    counts[expert] += 1
        return True

    def run(self, path: Path, sequences: List[List[int]]) -> Sums:
        callback = c.ggml_backend_sched_eval_callback(self.see)
        model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        assert model
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.cb_eval = callback
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as llama_cpp.Llama does
        params.n_threads = params.n_threads_batch = 2
        ctx = c.llama_init_from_model(model, params)
        assert ctx
        for tokens in sequences:
            c.llama_memory_clear(c.llama_get_memory(ctx), True)
            batch = c.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
            assert c.llama_decode(ctx, batch) == 0
            c.llama_batch_free(batch)
        c.llama_free(ctx)
        c.llama_model_free(model)
        return self.sums


def sequences(path: Path, n: int) -> List[List[int]]:
    """The text in pieces of a context, each with the token that begins a text, where the model wants one."""
    llm = hobbit_cpp.Llama(path, vocab_only=True, verbose=False)
    first = [llm.token_bos()] if llm._model.add_bos_token() else []
    words = llm.tokenize(TEXT.encode(), add_bos=False)
    llm.close()
    out = []
    while n > 0:
        out.append((first + words[: CONTEXT - len(first)])[:n])
        words = words[CONTEXT - len(first) :]
        n -= len(out[-1])
    return out


def read(path: Path) -> Sums:
    """By the reader of llama.cpp's own Python package."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    names = [name[: -len(".in_sum2")] for name in tensors if name.endswith(".in_sum2")]
    assert len([name for name in tensors if not name.startswith("hobbit.")]) == 2 * len(names)
    return {n: (tensors[f"{n}.in_sum2"].astype(np.float64), tensors[f"{n}.counts"].ravel().astype(np.int64)) for n in names}


MODELS = ["mixtral", "qwen3moe", "llama4", "gemma4", "gpt-oss", "deepseek2", "grovemoe"]


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_what_stock_llama_cpp_multiplies(name: str, tmp_path: Path) -> None:
    path = tiny(name) if name in ("mixtral", "qwen3moe") else tiny_architecture(name)
    n = 2 * CONTEXT + 20
    expected = Stock().run(path, sequences(path, n))
    out = tmp_path / "out.gguf"
    report = record_imatrix(path, TEXT, out, n_tokens=n, context=CONTEXT, expert_cache="30%", threads=2)
    found = read(out)
    assert report.n_tokens == n and set(found) == set(expected)
    for tensor, (sums, counts) in expected.items():
        np.testing.assert_array_equal(found[tensor][1], counts)
        np.testing.assert_allclose(found[tensor][0], sums, rtol=1e-4, atol=1e-6 * sums.max())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("imatrix") / "out.gguf"
    record_imatrix(tiny("mixtral"), TEXT, out, n_tokens=100, context=CONTEXT, dataset="fox.txt")
    yield out


def test_the_file_is_that_of_llama_imatrix(recorded: Path) -> None:
    fields = gguf.GGUFReader(recorded).fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.datasets"].contents() == ["fox.txt"]
    assert fields["imatrix.chunk_count"].contents() == 2
    assert fields["imatrix.chunk_size"].contents() == CONTEXT
    experts = {t.name: t for t in gguf.GGUFReader(tiny("mixtral")).tensors if t.name.endswith("_exps.weight")}
    shapes = {t.name: tuple(t.shape) for t in gguf.GGUFReader(recorded).tensors}
    for name, tensor in experts.items():
        assert shapes[f"{name}.in_sum2"] == (tensor.shape[0], tensor.shape[2])
        assert shapes[f"{name}.counts"] == (1, tensor.shape[2])
    assert not list(recorded.parent.glob("*.partial"))


def test_smaller_batches_give_the_same(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    record_imatrix(tiny("mixtral"), TEXT, out, n_tokens=100, context=CONTEXT, batch=5, memory="400MiB")
    for name, (sums, counts) in read(recorded).items():
        np.testing.assert_array_equal(read(out)[name][1], counts)
        np.testing.assert_allclose(read(out)[name][0], sums, rtol=1e-3)


def test_convert_uses_it(recorded: Path, tmp_path: Path) -> None:
    plain, better = tmp_path / "plain.gguf", tmp_path / "better.gguf"
    convert(tiny("mixtral"), plain, high="Q8_0", low="Q4_0", progress=False)
    convert(tiny("mixtral"), better, high="Q8_0", low="Q4_0", imatrix=recorded, progress=False)
    name = "hobbit.low.blk.0.ffn_down_exps.weight"
    one, other = (next(t.data for t in gguf.GGUFReader(p).tensors if t.name == name) for p in (plain, better))
    assert not np.array_equal(one, other)


def test_convert_finds_it_beside_the_model(recorded: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    model.symlink_to(tiny("mixtral"))
    matrix = imatrix_path(model)
    matrix.write_bytes(recorded.read_bytes())

    def used(**options: Any) -> bool:
        report = convert(model, out, force=True, progress=False, **options)
        written = "hobbit.imatrix" in gguf.GGUFReader(out).fields
        assert written is any(str(matrix) in note for note in report.fallbacks)
        return written

    assert used(high="Q8_0", low="Q4_0") and used(low="Q4_0") and used(high="Q8_0", low=None)
    assert not used(low="Q4_0", imatrix="none")
    assert not used(low=None)  # nothing is quantised
    matrix.write_bytes(b"GGUF")
    with pytest.raises(ConvertError, match="--imatrix none ignores it"):
        used(low="Q4_0")
    assert not used(low=None)


def test_collecting_ends_and_begins_anew() -> None:
    llm = hobbit_cpp.Llama(tiny("mixtral"), offload="lru", n_ctx=64, verbose=False)
    session = llm._offloaded()
    assert all(sums.size == 0 and counts.size == 0 for _, sums, counts in session.inputs())
    llm.eval(tokens := llm.tokenize(TEXT.encode())[:20])
    session.collect_inputs(True)
    llm.reset()
    llm.eval(tokens)
    counts = {name: int(counts.sum()) for name, _, counts in session.inputs()}
    k = llm.offload_info.n_expert_used
    # the last layer is computed only for the last token
    assert counts["blk.0.ffn_up_exps.weight"] == k * len(tokens) and set(counts.values()) == {k * len(tokens), k}
    assert sum(sums.nbytes + n.nbytes for _, sums, n in session.inputs()) == session.inputs_bytes()
    assert not list(session.input_rows())
    session.collect_inputs(True, rows=True)
    assert all(not counts.any() and not sums.any() for _, sums, counts in session.inputs())
    for piece in (tokens, tokens[:7]):
        llm.reset()
        llm.eval(piece)
        rows = {layer: x for layer, _, x, _ in session.input_rows()}
        assert len(rows) == llm.offload_info.n_moe_layer and len(rows[0]) == len(piece)
        assert sum(x.nbytes for x in rows.values()) <= session.inputs_bytes(len(piece)) - session.inputs_bytes()
    session.collect_inputs(False)
    llm.eval(tokens)
    assert all(counts.size == 0 for _, _, counts in session.inputs()) and not list(session.input_rows())
    llm.close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"context": 1}, ParameterError),
        ({"n_tokens": 0}, ParameterError),
        ({"batch": 0}, ParameterError),
        ({"memory": "20MiB"}, MemoryBudgetError),
    ],
)
def test_refused(arguments: Dict[str, Any], error: Any, tmp_path: Path) -> None:
    with pytest.raises(error):
        record_imatrix(tiny("mixtral"), TEXT, tmp_path / "out.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny("mixtral").read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_norm.weight").data[3] = np.inf
    reader.data.flush()
    with pytest.raises(HobbitError, match="not finite"):
        record_imatrix(path, TEXT, n_tokens=20, context=CONTEXT)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tmp_path / "m.gguf", tmp_path / "text.txt"
    model.symlink_to(tiny("mixtral"))
    text.write_text(TEXT)
    command = ["imatrix", str(model), "--text", str(text), "-n", "60", "-c", str(CONTEXT)]
    assert main(command) == 0
    assert "60 tokens" in capsys.readouterr().err
    assert imatrix_path(model) == tmp_path / "m.imatrix.gguf" and read(imatrix_path(model))
    assert main(command) == 1 and "--force" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main([*command[:2], "--text", "-", *command[4:], "-f", "-q"]) == 0
    assert main(["imatrix", str(tmp_path / "none.gguf"), "--text", str(text)]) == 1
    assert main([*command, "-o", str(tmp_path / "no" / "out.gguf")]) == 1


def test_as_many_inputs_as_are_wanted(tmp_path: Path) -> None:
    text = "the expert of the layer and the token in the wood " * 20
    for n_tokens, context, batch, inputs in ((60, 64, 16, 20), (60, 20, 5, 20), (60, 64, 64, 20)):
        report = record_imatrix(
            tiny("mixtral"), text, tmp_path / "a.gguf", n_tokens=n_tokens, inputs=inputs, context=context, batch=batch, threads=1
        )
        assert report.n_inputs == inputs, (context, batch)


def test_a_short_text_is_a_chunk(tmp_path: Path) -> None:

    record_imatrix(tiny("mixtral"), "the expert of the layer", tmp_path / "a.gguf", inputs=0, context=512, threads=1)
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["imatrix.chunk_count"].contents() == 1
