"""What llama-cpp-python's users call on `Llama`, with offload: the same as stock in exact mode, or refused by name."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import gguf
import numpy as np
import pytest

import hobbit_cpp._lib as _lib
from decode import TEXT, logits, words
from hobbit_cpp import HobbitError, HobbitWarning, Llama, ModelFormatError, OffloadParams, ParameterError, StateError
from hobbit_cpp._session import Session
from hobbit_cpp.cli import main as cli
from models import tiny, tiny_dual

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")

MODEL = "mixtral"
llama_cpp: Any = _lib.load_bindings()


def offloaded(path: Optional[Path] = None, **kwargs: Any) -> Any:
    path = path or tiny(MODEL)
    pool = Session(str(path), OffloadParams()).info.pool_max // 4
    return make(path, offload="hobbit", exact=True, expert_cache=pool, **kwargs)


def make(path: Optional[Path] = None, **kwargs: Any) -> Any:
    options: Dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
    options["verbose"] = False
    return Llama(str(path or tiny(MODEL)), **{**options, **kwargs})


@pytest.fixture(scope="module")
def pair() -> Iterator[List[Any]]:
    """Stock and offloaded: every call must give the same."""
    both = [make(logits_all=True, n_ctx=1024), offloaded(logits_all=True, n_ctx=1024)]
    yield both
    for llm in both:
        llm.close()


def plain(answer: Any) -> Any:
    """Without what differs by design."""
    if not isinstance(answer, dict):
        return [plain(chunk) for chunk in answer]
    return {k: v for k, v in answer.items() if k not in ("id", "created", "model")}


MESSAGES: List[Any] = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the fox and the expert"}]
ARGUMENTS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": ARGUMENTS}}
SCHEMA = {"type": "json_object", "schema": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}}

COMPLETIONS: List[Dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "stream": True},
    {"seed": 7, "temperature": 1.5, "top_k": 0, "top_p": 1.0},
    {"echo": True, "logprobs": 3, "temperature": 0},
    {"suffix": " and it sleeps", "temperature": 0},
    {"stop": ["e", "x"], "temperature": 0},
    {"logit_bias": {"40": 50.0}, "temperature": 0},
    {"repeat_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.3, "temperature": 0},
    {"mirostat_mode": 2, "seed": 3},
]
CHATS: List[Dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "stream": True},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0, "response_format": SCHEMA},
    {"temperature": 0, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    {"temperature": 0, "stop": ["a"]},
]


@pytest.mark.parametrize("options", COMPLETIONS, ids=lambda o: "-".join(o))
def test_create_completion(pair: List[Any], options: Dict[str, Any]) -> None:
    answers = [plain(llm.create_completion(TEXT.decode()[:40], max_tokens=10, **options)) for llm in pair]
    assert answers[0] == answers[1]
    assert pair[1].offload_stats().selections > 0


@pytest.mark.parametrize("options", CHATS, ids=lambda o: "-".join(o))
def test_create_chat_completion(pair: List[Any], options: Dict[str, Any]) -> None:
    if "tools" in options:
        for llm in pair:
            llm.chat_format = "chatml-function-calling"
    try:
        answers = [plain(llm.create_chat_completion(MESSAGES, max_tokens=60, **options)) for llm in pair]
    finally:
        for llm in pair:
            llm.chat_format = "llama-2"
    # Names of answers are random, also inside of tool calls.
    assert without_ids(answers[0]) == without_ids(answers[1])
    if options.get("response_format") is SCHEMA:
        assert json.loads(answers[1]["choices"][0]["message"]["content"])["a"] in "xy"


def without_ids(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: without_ids(v) for k, v in x.items() if k != "id"}
    return [without_ids(v) for v in x] if isinstance(x, list) else x


def test_grammar_and_seed(pair: List[Any]) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "the " ("fox" | "dog" | "cat")', verbose=False)
    texts = []
    for llm in pair:
        llm.set_seed(5)
        texts.append([llm(TEXT.decode()[:30], grammar=grammar, max_tokens=9)["choices"][0]["text"] for _ in range(3)])
    assert texts[0] == texts[1] and all(t[:7] in ("the fox", "the dog", "the cat") for t in texts[0])


@pytest.mark.parametrize("pooling", [0, 1, 3])
def test_embeddings(pooling: int) -> None:
    # llama.cpp pools within a ubatch, and aborts when it is smaller than the batch.
    both = [make(embedding=True, pooling_type=pooling, n_ubatch=64), offloaded(embedding=True, pooling_type=pooling)]
    texts = ["the fox", "a dog runs away", "hunters"]
    out = [llm.create_embedding(texts) for llm in both]
    assert np.array_equal(np.concatenate([np.ravel(d["embedding"]) for d in out[0]["data"]]),
                          np.concatenate([np.ravel(d["embedding"]) for d in out[1]["data"]]))  # fmt: skip
    assert out[0]["usage"] == out[1]["usage"]
    assert both[0].embed(texts[0], normalize=True) == both[1].embed(texts[0], normalize=True)
    assert both[1].tokenize(b"") and both[0].embed(["", "x"]) == both[1].embed(["", "x"]), "of the begin token alone"
    with pytest.raises(ValueError, match="empty text"):
        both[1].embed([])
    # And a text after it.
    assert both[0](texts[1], temperature=0)["choices"][0]["text"] == both[1](texts[1], temperature=0)["choices"][0]["text"]
    for llm in both:
        llm.close()
    # As many sequences as a batch has tokens, where buffers are laid out for fewer.
    llm = offloaded(embedding=True, pooling_type=pooling)
    for n in (1, 5, 31, 32):
        assert all(part > 0 for part in llm._offloaded().fit_batches(llm._context_address(), n))
    llm.close()
    llm = offloaded()
    with pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed("x")
    llm.close()
    llm = offloaded(embedding=True, kv_overrides={"tokenizer.ggml.add_bos_token": False})
    assert not llm.tokenize(b"")
    for nothing in ("", [], ["x", ""], ("",)):
        with pytest.raises(ValueError, match="empty text"):
            llm.embed(nothing)
    llm.close()


def test_draft_model() -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    texts = []
    for new in (make, offloaded):
        # 200 tokens: more than n_batch, beyond which stock's `scores` end.
        llm = new(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3, max_ngram_size=2), n_batch=256)
        texts.append(llm.create_completion(words(llm, 100) * 2, max_tokens=20, temperature=0)["choices"][0]["text"])
        llm.close()
    assert texts[0] == texts[1]
    llm = offloaded(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3, max_ngram_size=2))
    assert llm.create_completion(words(llm, 100) * 2, max_tokens=20, temperature=0)["choices"][0]["text"]
    llm.close()


@pytest.mark.parametrize(
    "options",
    [
        {"type_k": 8, "type_v": 8, "flash_attn": True},
        {"flash_attn": True},
        {"n_gpu_layers": -1, "split_mode": 0, "main_gpu": 0},
        {"use_mmap": False, "offload_kqv": False, "op_offload": True, "swa_full": False, "no_perf": True},
        {"kv_overrides": {"llama.expert_used_count": 4}},
        {"rope_freq_base": 5000.0, "rope_freq_scale": 0.5},
        {"numa": 1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_the_constructor(options: Dict[str, Any]) -> None:
    outs = []
    for new in (make, offloaded):
        llm = new(logits_all=True, **options)
        outs.append(logits(llm, words(llm, 40), 8))
        llm.close()
    assert np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("mode", [None, "hobbit"])
def test_a_sampler_does_not_outlive_its_answer(mode: Optional[str]) -> None:
    """It holds a candidate for each word of the vocabulary, and is part of a cycle: the collector would free it much later."""
    given: Dict[str, Any] = {} if mode is None else {"offload": mode, "expert_cache": "100%"}
    llm: Any = Llama(str(tiny("mixtral")), n_ctx=128, verbose=False, **given)
    llm.create_completion("the expert", max_tokens=4)
    first = llm._sampler
    chunks = llm.create_completion("the layer", max_tokens=4, stream=True)
    next(chunks)
    second = llm._sampler
    assert first.sampler is None and second.sampler is not None
    del chunks
    llm.eval(llm.tokenize(b"a token"))
    llm.sample()
    llm.close()
    assert second.sampler is None


def test_two_models_in_one_process() -> None:
    first, second = offloaded(logits_all=True), offloaded(tiny_dual("qwen3moe"), logits_all=True)
    stock = [make(logits_all=True), make(tiny_dual("qwen3moe"), logits_all=True)]
    tokens = words(first, 40)
    want = [logits(s, tokens, 8) for s in stock]
    for llm in (first, second):
        llm.reset()
    for i in range(0, 40, 8):
        first.eval(tokens[i : i + 8])
        second.eval(tokens[i : i + 8])
    assert np.array_equal(first.scores[:40], want[0]) and np.array_equal(second.scores[:40], want[1])
    first.close()
    assert np.array_equal(logits(second, tokens, 8), want[1])
    for s in (second, *stock):
        s.close()


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def adapter(path: Path, targets: Dict[str, Any], rank: int = 4) -> Path:
    """A LoRA on `targets` (name -> shape, slowest axis first) with random weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rng = np.random.default_rng(1)
    for name, (*experts, n_out, n_in) in targets.items():
        for part, shape in (("a", (rank, n_in)), ("b", (n_out, rank))):
            writer.add_tensor(f"{name}.lora_{part}", (rng.standard_normal((*experts, *shape)) * 0.1).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(*names: str) -> Dict[str, Any]:
    tensors = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.GGUFReader(tiny(MODEL)).tensors}
    return {name: tensors[name] for name in names}


DENSE = ("blk.0.attn_q.weight", "blk.1.attn_output.weight", "blk.1.ffn_gate_inp.weight")
EXPERTS = ("blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight")


@pytest.mark.parametrize("names", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_lora_is_stock_bit_for_bit(names: Tuple[str, ...], tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora.gguf", shapes(*names))
    outs = {}
    for new in (make, offloaded):
        for scale in (0.0, 1.5):
            llm = new(logits_all=True, lora_path=str(path), lora_scale=scale)
            outs[new.__name__, scale] = logits(llm, words(llm, 40), 8)
            llm.close()
    assert np.array_equal(outs["make", 1.5], outs["offloaded", 1.5])
    assert np.array_equal(outs["make", 0.0], outs["offloaded", 0.0])
    assert not np.array_equal(outs["make", 1.5], outs["make", 0.0])


def test_a_lora_that_cannot_be_read(tmp_path: Path) -> None:
    for bad, what in ((tmp_path / "none.gguf", "no file"), (Path(__file__), "not a GGUF")):
        with pytest.raises(HobbitError, match=what):
            offloaded(lora_path=str(bad))


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_pickling() -> None:
    llm = offloaded()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(llm)
    llm.close()
    stock = make()
    again: Any = pickle.loads(pickle.dumps(stock))
    assert again.n_ctx() == stock.n_ctx()
    stock.close()
    again.close()


def test_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_dual(MODEL)
    hub: Any = types.ModuleType("huggingface_hub")
    utils: Any = types.ModuleType("huggingface_hub.utils")
    hub.hf_hub_download = lambda **kwargs: str(path)
    utils.validate_repo_id = lambda name: None

    class FileSystem:
        def ls(self, repo: str, recursive: bool) -> List[str]:
            return [f"{repo}/{path.name}", f"{repo}/README.md"]

    hub.HfFileSystem = FileSystem
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    pretrained: Any = Llama.from_pretrained
    llm: Any = pretrained("some/model", "*.gguf", offload="hobbit", memory="2GiB", n_ctx=64, verbose=False)
    assert type(llm) is Llama and llm.offload_stats().memory_budget == 2 << 30
    answer: Any = llm("the fox", max_tokens=3)
    assert answer["choices"][0]["text"]
    llm.close()


def test_what_does_not_go_with_offload_is_refused_by_name() -> None:
    for name in ("use_mlock", "vocab_only"):
        options: Dict[str, Any] = {name: True}
        with pytest.raises(ParameterError, match=name):
            offloaded(**options)


def test_the_reason_why_a_file_cannot_be_loaded_is_in_the_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(ModelFormatError, match=r"bad.gguf.*magic"):
        make(path)
    with pytest.raises(ValueError, match="flash_attn"):
        make(type_v=8)
    assert capfd.readouterr().err == ""
    for offload in ("none", "hobbit"):
        assert cli(["run", str(path), "-p", "x", "--offload", offload]) == 1
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and err.startswith("hobbit: ") and "bad.gguf" in err
    assert isinstance(ModelFormatError("x"), ValueError)  # which is what stock raises


def test_arguments_that_there_are_not() -> None:
    path = str(tiny("mixtral"))
    for wrong, says in (
        ({"memroy": "1GiB"}, "is 'memory' meant"),
        ({"prefetch_depth": 0}, r"OffloadParams\(prefetch_depth="),
        ({"n_threads": 513}, "n_threads=513: .* at most 512"),
        ({"n_threads_batch": -1}, "n_threads_batch=-1"),
    ):
        with pytest.raises(ParameterError, match=says):
            Llama(path, offload="hobbit", verbose=False, **wrong)
    # Other programs pass what upstream had once, or what only its server knows.
    with pytest.warns(HobbitWarning, match="no argument n_parts, f16_kv, rpc_servers: ignored") as told:
        Llama(path, offload="hobbit", n_ctx=64, n_parts=-1, f16_kv=True, rpc_servers=None, verbose=False).close()
    assert told[0].filename == __file__


def test_signatures_are_upstreams_with_ours_besides() -> None:
    own, theirs = (inspect.signature(cls).parameters for cls in (Llama, llama_cpp.Llama))
    assert set(theirs) < set(own) and {"offload", "memory", "quality"} <= set(own) - set(theirs)
    for name, method in vars(llama_cpp.Llama).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            ours = getattr(Llama, name)
            assert inspect.signature(ours) == inspect.signature(method), name
            assert ours.__doc__ or not method.__doc__, name


def test_all_outputs_of_a_batch_that_nobody_announced() -> None:
    """With logits_all=False, as programs do that call llama.cpp themselves; buffers are laid out for one output."""
    rows = []
    for llm in (make(), offloaded()):
        tokens = llm.tokenize(b"the fox and the dog run through the wood")
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        got = [llama_cpp.llama_get_logits_ith(llm.ctx, i)[: llm.n_vocab()] for i in range(len(tokens))]
        rows.append(np.array(got))
        llama_cpp.llama_batch_free(batch)
        llm.reset()
        assert llm.create_completion("the fox", max_tokens=2, temperature=0)["usage"]["completion_tokens"] == 2
        llm.close()
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("new", [make, offloaded], ids=["stock", "offloaded"])
def test_a_completion_in_a_logits_processor(new: Any) -> None:
    llm, texts = new(), []

    def within(ids: Any, scores: Any) -> Any:
        texts.append(llm.create_completion("x", max_tokens=2, temperature=0)["choices"][0]["text"])
        return scores

    processors = llama_cpp.LogitsProcessorList([within])
    llm.create_completion("the fox runs", max_tokens=3, temperature=0, logits_processor=processors)
    assert texts and not llm._retired, "samplers are freed when nobody samples"
    llm.close()


def test_logprobs_are_upstreams_whatever_is_made_at_a_time() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((37, 100)).astype(np.single)
    by_row = np.stack([llama_cpp.Llama.logits_to_logprobs(row) for row in logits])
    assert np.array_equal(llama_cpp.Llama.logits_to_logprobs(logits), by_row)
    assert np.allclose(np.exp(by_row).sum(-1), 1, atol=1e-5)


def test_a_closed_model_says_so() -> None:
    llm = offloaded()
    llm.close()
    for ask in (llm.n_ctx, llm.n_embd, llm.n_vocab, lambda: llm.tokenize(b"x")):
        with pytest.raises(StateError, match="closed"):
            ask()


def test_a_grammar_and_tokens_that_are_none() -> None:
    llm = offloaded()
    grammar = llama_cpp.LlamaGrammar.from_string("bad ::", verbose=False)
    with pytest.raises(ValueError, match="grammar"):
        llm.create_completion("x", max_tokens=2, grammar=grammar)
    for token in (-1, llm.n_vocab()):
        with pytest.raises(ValueError, match="no token"):
            llm.detokenize([token])
    assert llm.detokenize([]) == b""
    assert llm.detokenize(t for t in [5, 6]) == llm.detokenize([5, 6]) != b""
    for bias in ({llm.n_vocab(): 1.0}, {"-1": 1.0, 5: 2.0}):
        with pytest.raises(ValueError, match="logit_bias: there is no token"):
            llm.create_completion("x", max_tokens=2, logit_bias=bias)
    llm.close()
