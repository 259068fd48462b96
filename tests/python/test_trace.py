"""Traces: the file, `record` and `hobbit trace`, and a model that follows a recorded routing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

from decode import load, logits, words
from hobbit_cpp import Llama, OffloadParams, ParameterError, StateError, TraceFormatError
from hobbit_cpp._session import Session
from hobbit_cpp.cli import main
from hobbit_cpp.trace import Trace, record
from hobbit_cpp.trace.record import documents_of, sequences_of
from models import tiny, tiny_architecture, tiny_dual
from tiny_models import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

EXACT = OffloadParams(exact=True, prefetch_depth=0)


def random_trace(tokens: int = 40, layers: int = 3, experts: int = 8, k: int = 2, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :k].astype(np.uint16)
    weights = rng.random((tokens, layers, k), dtype=np.float32) + 0.01
    return Trace(ids, weights, np.array([tokens], np.int32), experts)


def test_of_a_long_text_only_what_is_wanted_is_tokenised() -> None:
    class Words:
        """A token a word."""

        longest = 0

        def token_bos(self) -> int:
            return -1

        _model = SimpleNamespace(add_bos_token=lambda: False)

        def tokenize(self, text: bytes, **how: bool) -> List[int]:
            self.longest = max(self.longest, len(text))
            return [int(w) for w in text.split()]

    short, long = (" ".join(f"{i:0{width}}" for i in range(100_000)) for width in (5, 60))
    for text, most in ((short, 20_000), (long, 100_000)):
        llm = Words()
        assert sequences_of(llm, text, 64, False, 150) == [list(range(64)), list(range(64, 128)), list(range(128, 150))]
        assert llm.longest < most
    llm = Words()
    assert sum(map(len, sequences_of(llm, short, 64, False, None))) == 100_000


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts,dtype", [(8, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_what_is_saved_is_loaded(tmp_path: Path, experts: int, dtype: Any) -> None:
    trace = random_trace(experts=experts).with_predictions(0.7, depth=2)
    trace = Trace(**{**vars(trace), "lens": np.array([30, 10], np.int32), "meta": {"model": "ä", "n": [1]}})
    trace.save(tmp_path / "a.npz")
    assert os.listdir(tmp_path) == ["a.npz"]
    with np.load(tmp_path / "a.npz") as raw:
        assert raw["ids"].dtype == raw["predicted_ids"].dtype == dtype
        assert raw["weights"].dtype == np.float16 and raw["lens"].dtype == np.int32
    again = Trace.load(tmp_path / "a.npz")
    for name in ("ids", "lens", "predicted_ids", "predicted_weights"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    assert np.array_equal(trace.weights.astype(np.float16), again.weights)
    assert again.meta == trace.meta and again.n_experts == experts


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    random_trace().save(path)
    before = path.read_bytes()

    def full(f: Any, **arrays: Any) -> None:
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError):
        random_trace(seed=1).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


def test_head_cuts_the_last_sequence() -> None:
    trace = random_trace(40)
    trace = Trace(trace.ids, trace.weights, np.array([10, 20, 10], np.int32), 8)
    assert trace.head(10).lens.tolist() == [10]
    assert trace.head(29).lens.tolist() == [10, 19] and trace.head(29).n_tokens == 29
    assert trace.head(99).lens.tolist() == [10, 20, 10]


@pytest.mark.parametrize("recall", [0.0, 0.6, 1.0])
def test_made_up_predictions_are_as_good_as_asked_for(recall: float) -> None:
    trace = random_trace(tokens=600, layers=5, experts=16, k=4).with_predictions(recall, depth=2, seed=3)
    assert trace.predicted_ids is not None and trace.depth == 2
    for d in range(2):
        right = (trace.ids[:, d + 1 :, :, None] == trace.predicted_ids[:, d + 1 :, d, None]).any(-1)
        assert abs(right.mean() - recall) < 0.02
        ordered = np.sort(trace.predicted_ids[:, d + 1 :, d], axis=-1)
        assert (ordered[..., 1:] != ordered[..., :-1]).all()
    same = random_trace(tokens=600, layers=5, experts=16, k=4).with_predictions(recall, depth=2, seed=3)
    assert same.predicted_ids is not None and np.array_equal(trace.predicted_ids, same.predicted_ids)


BAD: Dict[str, Any] = {
    "an id": lambda a: {"ids": a["ids"] + 7},
    "ids": lambda a: {"ids": a["ids"].astype(np.float32)},
    "empty": lambda a: {"ids": a["ids"][:0], "weights": a["weights"][:0], "lens": a["lens"][:0]},
    "shape of the ids": lambda a: {"weights": a["weights"][:, :1]},
    "not a number": lambda a: {"weights": a["weights"] * np.float32("nan")},
    "lens sum": lambda a: {"lens": a["lens"] - 1},
    "lens sum to 18": lambda a: {"lens": np.array([2**63 - 1, 2**63 - 1, 2 + len(a["ids"])], np.uint64)},  # 40 modulo 2^64
    "positive": lambda a: {"lens": np.array([41, -1], np.int32)},
    "twice": lambda a: {"ids": np.zeros_like(a["ids"])},
    "cannot be": lambda a: {"n_experts": np.int32(1)},
    "go together": lambda a: {"predicted_ids": a["ids"][:, :, None]},
    "layers ahead": lambda a: {"predicted_ids": np.zeros((40, 3, 5, 2), np.uint8), "predicted_weights": np.zeros((40, 3, 5, 2))},
}  # fmt: skip


@pytest.mark.parametrize("why", sorted(BAD))
def test_a_file_that_contradicts_itself(tmp_path: Path, why: str) -> None:
    random_trace().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "b.npz", **{**arrays, **BAD[why](arrays)})
    with pytest.raises(TraceFormatError, match=why):
        Trace.load(tmp_path / "b.npz")


def test_meta_is_plain_data(tmp_path: Path) -> None:
    random_trace().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        np.savez(tmp_path / "b.npz", **{**archive, "meta": np.array('{"a": NaN, "b": 1}')})
    assert Trace.load(tmp_path / "b.npz").meta == {"a": None, "b": 1}, "what JSON has no word for"


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    random_trace().save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    other = io.BytesIO()
    np.savez(other, a=np.zeros(3))
    begin = whole.index(b"ids.npy") + 60
    torn = whole[:begin] + b"\xff" * 40 + whole[begin + 40 :]  # within compressed numbers
    for data in (b"", b"GGUF", whole[: len(whole) // 2], torn, single.getvalue(), other.getvalue()):
        (tmp_path / "b.npz").write_bytes(data)
        with pytest.raises(TraceFormatError, match=r"b\.npz"):
            Trace.load(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")


# ---- recording -------------------------------------------------------------------------------------------------------


def test_record_is_what_the_model_selects() -> None:
    path = tiny("qwen3moe")
    text = "The quick brown fox jumps over the lazy dog. " * 12
    steps = []
    trace = record(path, text, context=64, n_tokens=150, threads=1, progress=lambda done, total: steps.append((done, total)))
    assert trace.lens.tolist() == [64, 64, 22] and steps[-1] == (150, 150)
    llm = load(Llama, str(path), 1, offload=EXACT)
    bos = [llm.token_bos()] if llm._model.add_bos_token() else []
    tokens = llm.tokenize(text.encode(), add_bos=False)
    room = 64 - len(bos)
    for i in range(2):
        llm._session.trace(True)
        logits(llm, bos + tokens[i * room : (i + 1) * room], 64)
        ids, weights = llm._session.trace_read()
        llm._session.trace(False)
        assert np.array_equal(ids, trace.ids[64 * i : 64 * (i + 1)])
        assert np.array_equal(weights, trace.weights[64 * i : 64 * (i + 1)])
    llm.close()


def test_documents_are_what_stands_between_blank_lines() -> None:
    assert documents_of("\n\na\nb\n \nc\n\n\n") == ["a\nb", "c"]
    assert documents_of(" \n") == []
    trace = record(tiny("mixtral"), "one two\nthree\n\n\nfour " + "five " * 90, context=32, documents=True, threads=1)
    assert len(trace.lens) == 2 and trace.lens[1] == 32 and trace.lens[0] < 32


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_predictions_are_those_that_the_engine_goes_by(shape: str) -> None:
    path = tiny(shape)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    trace = record(path, text, context=128, predictions=2, threads=1)
    assert trace.depth == 2 and trace.predicted_ids is not None and trace.predicted_weights is not None
    recorded = {}
    for d in range(min(2, trace.n_layers - 1)):
        guess = trace.predicted_ids[:, d + 1 :, d, : trace.k]
        recorded[d + 1] = (trace.ids[:, d + 1 :, :, None] == guess[:, :, None]).any(-1).mean()
        assert not trace.predicted_ids[:, : d + 1, d].any()
    # The engine's own count on the same tokens; it does not predict where nothing is missing.
    params = OffloadParams(exact=True, prefetch_depth=2, prefetch_always=True, gate_correction=False)
    llm = load(Llama, str(path), 1, offload=params, expert_cache=smallest_pool(path))
    logits(llm, llm.tokenize(text.encode())[:128], 1)
    for d, recall in llm.offload_stats().recall.items():
        assert abs(recall - recorded[d]) < 0.1, d
    llm.close()


def test_predictions_are_recorded_without_prefetch_only() -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, offload="hobbit", expert_cache="100%")
    with pytest.raises(StateError, match="prefetch_depth=0"):
        llm._session.trace(True, 1)
    llm.close()
    llm = load(Llama, str(tiny("mixtral")), 1, offload=EXACT, expert_cache="100%")
    with pytest.raises(ParameterError, match="at most 4"):
        llm._session.trace(True, 5)
    llm.close()


def test_a_recording_of_so_many_tokens_ends_before_the_batch_that_is_too_many() -> None:
    llm = load(Llama, str(tiny("mixtral")), 1, offload=EXACT, expert_cache="100%")
    session, tokens = llm._session, words(llm, 12)
    session.trace(True)
    logits(llm, tokens, 4)
    whole = session.trace_read()
    llm.reset()
    session.trace(True, max_tokens=9)
    logits(llm, tokens[:11], 4)  # 4, 4, 3
    logits(llm, tokens[11:], 1)  # for which there would be room
    first = session.trace_read()
    assert len(whole[0]) == 12 and len(first[0]) == 8
    for a, b in zip(first, whole):
        assert np.array_equal(a, b[:8])
    llm.close()


# ---- a model that follows a trace ------------------------------------------------------------------------------------


def smallest_pool(path: Path) -> int:
    return Session(str(path), EXACT).info.pool_min * 2


def own_trace(llm: Any, tokens: Any, chunk: int) -> Tuple[Any, Trace]:
    llm._session.trace(True)
    out = logits(llm, tokens, chunk)
    ids, weights = llm._session.trace_read()
    llm._session.trace(False)
    return out, Trace(ids, weights, np.array([len(tokens)], np.int32), llm.offload_info.n_expert)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_model_that_follows_its_own_trace_computes_the_same(shape: str) -> None:
    path = tiny_dual(shape)
    llm = load(Llama, str(path), 1, offload=EXACT, expert_cache=smallest_pool(path))
    tokens = words(llm, 70)
    for chunk in (1, 64):
        want, trace = own_trace(llm, tokens, chunk)
        llm.set_routing(trace)
        assert np.array_equal(logits(llm, tokens, chunk), want)
        # Another text with the same routing is routed by it all the same.
        other = list(reversed(tokens))
        llm.set_routing(trace)
        _, followed = own_trace(llm, other, chunk)
        assert np.array_equal(followed.ids, trace.ids) and np.array_equal(followed.weights, trace.weights)
        llm.set_routing(None)
        assert np.array_equal(logits(llm, tokens, chunk), want)
    llm.close()


def test_another_routing_is_followed_row_by_row_and_over_again(tmp_path: Path) -> None:
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload=EXACT, expert_cache=smallest_pool(path))
    info = llm.offload_info
    tokens = words(llm, 30)
    own = logits(llm, tokens, 1)
    trace = random_trace(tokens=12, layers=info.n_moe_layer - 1, experts=info.n_expert, k=info.n_expert_used)
    for chunk in (1, 7):
        trace.save(tmp_path / "a.npz")
        llm.set_routing(trace if chunk == 1 else tmp_path / "a.npz")
        got, followed = own_trace(llm, tokens, chunk)
        rows = np.arange(30) % 12
        layers = np.arange(info.n_moe_layer) % trace.n_layers
        assert np.array_equal(followed.ids, trace.ids[rows][:, layers])
        assert np.allclose(followed.weights, trace.weights[rows][:, layers], rtol=0 if chunk == 1 else 1e-3)
        assert np.isfinite(got).all() and not np.array_equal(got, own)
    llm.close()


@pytest.mark.parametrize("recall", [0.5, 1.0])
def test_prefetch_goes_by_the_predictions_of_the_trace(recall: float) -> None:
    path = tiny("qwen3moe")
    params = OffloadParams(exact=True, prefetch_depth=1, prefetch_always=True)
    llm = load(Llama, str(path), 1, offload=params, expert_cache=smallest_pool(path))
    info = llm.offload_info
    trace = random_trace(tokens=100, layers=info.n_moe_layer, experts=info.n_expert, k=info.n_expert_used)
    tokens = words(llm, 100)
    llm.set_routing(trace)
    logits(llm, tokens, 1)
    assert llm.offload_stats().prefetches == 0  # no predictions: nothing is guessed
    llm.set_routing(trace.with_predictions(recall))
    logits(llm, tokens, 1)
    stats = llm.offload_stats()
    assert stats.prefetches > 0
    assert abs(stats.recall[1] - recall) < (0.08 if recall < 1 else 1e-9)
    llm.close()


@pytest.mark.parametrize("name", ["grovemoe", "nemotron_h_moe"])
def test_layers_that_differ_follow_their_own_trace(name: str, tmp_path: Path) -> None:
    """Layers with fewer experts, with fewer a token, or with one chosen twice: a trace has k different ones in each row."""
    path = tiny_architecture(name, "Q8_0")
    llm = load(Llama, str(path), 1, offload=OffloadParams(exact=True, prefetch_depth=0), expert_cache="100%")
    session, info = llm._session, llm.offload_info
    tokens = words(llm, 24)
    session.trace(True)
    want = logits(llm, tokens, 1)
    ids, weights = session.trace_read()
    session.trace(False)
    trace = Trace(ids=ids, weights=weights, lens=np.array([len(ids)], np.int32), n_experts=info.n_expert)
    trace.save(tmp_path / "a.npz")  # where weights are rounded
    assert np.array_equal(Trace.load(tmp_path / "a.npz").ids, trace.ids)
    assert (trace.weights == 0).any(), "some rows are filled up"
    llm.reset()
    llm.set_routing(trace)
    got = logits(llm, tokens, 1)
    llm.close()
    if name == "nemotron_h_moe":
        assert np.array_equal(got, want)
    assert np.isfinite(got).all()


def test_a_routing_that_does_not_fit_is_refused() -> None:
    path = tiny("mixtral")
    llm = load(Llama, str(path), 1, offload=EXACT, expert_cache="100%")
    info = llm.offload_info
    with pytest.raises(ParameterError, match=f"selects 1 experts a token, the model {info.n_expert_used}"):
        llm.set_routing(random_trace(k=1))
    wide = random_trace(experts=info.n_expert + 8, k=info.n_expert_used)
    with pytest.raises(ParameterError, match=f"the model has {info.n_expert}"):
        llm.set_routing(wide)
    llm.close()
    with pytest.raises(StateError):
        llm.set_routing(None)
    with pytest.raises(StateError):
        load(Llama, str(path), 1).set_routing(random_trace())


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.npz"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    argv = ["trace", str(tiny("mixtral")), "--text", str(text), "-o", str(out), "-n", "100", "-c", "40", "--predictions", "2"]
    assert main([*argv, "--expert-cache", "100%", "-t", "1"]) == 0
    trace = Trace.load(out)
    assert trace.n_tokens == 100 and trace.lens.tolist() == [40, 40, 20] and trace.depth == 2
    assert trace.meta["text"] == "text.txt" and trace.meta["phase"] == "teacher-forced"
    assert trace.meta["model"] == tiny("mixtral").name
    assert "100 tokens in 3 sequences" in capsys.readouterr().err
    before = out.read_bytes()
    assert main(argv) == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == before


def test_documents_longer_than_the_context_do_not_end_the_text_early(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.npz"
    text.write_text("\n\n".join("word " * 20_000 for _ in range(6)))
    argv = ["trace", str(tiny("mixtral")), "--text", str(text), "-o", str(out), "-n", "180", "-c", "32", "--documents", "-q"]
    assert main([*argv, "-t", "1"]) == 0
    assert Trace.load(out).lens.tolist() == [32, 32, 32, 32, 32, 20]


@pytest.mark.parametrize(
    "change,says",
    [
        ({"model": "none.gguf"}, "no such file"),
        ({"text": "none.txt"}, "none.txt: no such file"),
        ({"text": "empty.txt"}, "is empty"),
        ({"text": "binary.txt"}, "not UTF-8"),
        ({"out": "no/folder/a.npz"}, "not a folder"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Dict[str, str], says: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.txt").write_text("some text")
    names = {"text": "text.txt", "out": "a.npz", **change}
    model = tiny("mixtral") if "model" not in change else tmp_path / change["model"]
    assert main(["trace", str(model), "--text", str(tmp_path / names["text"]), "-o", str(tmp_path / names["out"])]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.npz*"))
