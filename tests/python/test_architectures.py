"""Every architecture with routed experts of the pinned llama.cpp runs offloaded: exactly in exact mode, soundly otherwise."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from decode import embeddings, load, logits, stock_logits_of, words
from hobbit_cpp import Llama, ModelFormatError, OffloadParams, OffloadStats
from hobbit_cpp._session import Session
from hobbit_cpp.llama import llama_cpp
from models import tiny_architecture
from tiny_models import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
everyone = pytest.mark.parametrize("name", sorted(ARCHITECTURES))

Array = npt.NDArray[np.float32]
N_PREFILL, N_DECODE = 40, 24  # longer than the sliding window of 32

#: Routers that cannot be predicted: nothing of the next layer is computed by a router of its own.
NOT_PREDICTED = {"grovemoe"}
#: Router weights are not normalised over the selection: to leave experts out is to leave their weights out.
NOT_NORMALISED = {
    "deepseek", "jamba", "llada-moe", "llama4", "nomic-bert-moe", "olmoe", "qwen2moe",
}  # fmt: skip


def outputs(llm: Llama, name: str) -> List[Array]:
    """Of a prompt in one batch, and token by token."""
    tokens = words(llm, N_PREFILL)
    if ARCHITECTURES[name].embeddings:
        return [embeddings(llm, tokens)]
    return [logits(llm, tokens, 64), logits(llm, tokens[:N_DECODE], 1)]


def open_model(path: Path, name: str, **kwargs: Any) -> Llama:
    # One thread: two of them spin at each other's barriers on a busy machine. test_exact.py has more.
    llm: Llama = load(Llama, str(path), 1, embedding=ARCHITECTURES[name].embeddings, **kwargs)
    return llm


def run(path: Path, name: str, **kwargs: Any) -> List[Array]:
    llm = open_model(path, name, **kwargs)
    out = outputs(llm, name)
    llm.close()
    return out


@functools.cache
def stock(path: Path, name: str) -> List[Array]:
    out = run(path, name)
    assert all(np.isfinite(a).all() and a.std() > 0.01 for a in out)
    return out


def same(a: List[Array], b: List[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def small_pool(path: Path) -> int:
    """Far below all experts, so that they come and go."""
    info = Session(str(path), OffloadParams()).info
    return max(info.pool_max // 4, info.pool_min)


def offloaded(path: Path, name: str, **kwargs: Any) -> Tuple[List[Array], OffloadStats]:
    llm = open_model(path, name, expert_cache=small_pool(path), **kwargs)
    out, stats = outputs(llm, name), llm.offload_stats()
    llm.close()
    return out, stats


def used_in(name: str, block: int) -> int:
    """Experts that a token uses in a block."""
    k: Union[int, List[int]] = ARCHITECTURES[name].metadata.get("expert_used_count", 3)
    return k if isinstance(k, int) else k[block]


def check_counts(stats: OffloadStats, name: str) -> None:
    assert stats.n_tokens >= N_PREFILL
    assert stats.layers
    for layer in stats.layers:
        assert layer.selections == stats.n_tokens * used_in(name, layer.block)
        served = layer.hits_high + layer.hits_low + layer.loads_high + layer.loads_low + layer.skips
        assert layer.selections == served
        assert layer.mass_total == pytest.approx(stats.n_tokens)


@everyone
@pytest.mark.parametrize("which", [0, 1])
def test_exact_is_stock(name: str, which: int) -> None:
    path = tiny_architecture(name, ARCHITECTURES[name].types[which])
    got, stats = offloaded(path, name, offload="hobbit", exact=True)
    assert same(got, stock(path, name))
    check_counts(stats, name)
    assert stats.loads_high > 0 and stats.loads_low == stats.hits_low == stats.skips == 0


def held(llm: Any) -> int:
    session = llm._session
    return int(session._lib.hobbit_context_resident_bytes(session._ffi.cast("void *", llm._context_address())))


@everyone
def test_embeddings_may_stay_on_disk(name: str) -> None:
    path = tiny_architecture(name, ARCHITECTURES[name].types[0])
    llm = open_model(path, name, expert_cache=small_pool(path), offload=OffloadParams(exact=True, embeddings_on_disk=True))
    assert llm._session is not None
    if name == "nomic-bert-moe":  # no output matrix
        assert not llm._session.embeddings_on_disk
    else:
        # llama.cpp says so too: nothing of them is among what it holds.
        in_memory = open_model(path, name, expert_cache=small_pool(path), offload=OffloadParams(exact=True))
        assert held(in_memory) - held(llm) >= llm._session.info.bytes_embeddings > 0
        in_memory.close()
    assert same(outputs(llm, name), stock(path, name))
    llm.close()


@everyone
def test_buffers_may_be_laid_out_anew_between_batches(name: str) -> None:
    """For fewer tokens than the batch has, too: then llama.cpp lays them out itself."""
    path = tiny_architecture(name, ARCHITECTURES[name].types[0])
    llm = open_model(path, name, expert_cache=small_pool(path), offload="hobbit", exact=True)
    session = llm._session
    assert session is not None
    taken = []
    for n in (1, 64, 16):
        taken.append(session.fit_batches(llm._context_address(), n)[0])
        assert same(outputs(llm, name), stock(path, name)), n
    assert 0 < taken[0] < taken[2] < taken[1]
    llm.close()


@everyone
def test_hobbit_mode_hears_the_router(name: str) -> None:
    path = tiny_architecture(name, "Q8_0", "Q4_0")
    got, stats = offloaded(path, name, offload=OffloadParams(t1=0.3, t2=0.55, prefetch_always=True))
    check_counts(stats, name)
    assert all(np.isfinite(a).all() for a in got)
    several = any(used_in(name, layer.block) > 1 for layer in stats.layers)
    if several and not ARCHITECTURES[name].embeddings:  # in a batch of tokens each expert is the first of one of them
        assert stats.loads_low > 0 and stats.skips > 0
        assert 0 < stats.mass_skipped < 0.35 * stats.mass_total and stats.mass_low > 0
        assert not same(got, stock(path, name))
    if not ARCHITECTURES[name].embeddings and name not in NOT_PREDICTED:
        # By chance k of 8 would be right.
        assert stats.recall[1] > 1.3 * max(used_in(name, layer.block) for layer in stats.layers) / 8


@everyone
@pytest.mark.parametrize("rule", ["miss", "weight"])
def test_wide_open_thresholds_are_exact(name: str, rule: str) -> None:
    path = tiny_architecture(name, "Q8_0", "Q4_0")
    got, _ = offloaded(path, name, offload=OffloadParams(precision_rule=rule, t1=1.0, t2=1.0))
    assert same(got, stock(path, name))


@everyone
def test_low_copies_are_where_they_belong(name: str) -> None:
    """Copies of the same type, served for all but the first expert: nothing may change."""
    path = tiny_architecture(name, "Q8_0", "Q8_0")
    got, stats = offloaded(path, name, offload=OffloadParams(precision_rule="weight", t1=0.0, t2=1.0))
    assert same(got, stock(path, name))
    assert stats.skips == 0 and (stats.hits_low > 0) == any(used_in(name, layer.block) > 1 for layer in stats.layers)


def without_selection_bias(path: Path, target: Path) -> Path:
    """A copy whose routers rank by weight alone, so that the first is the one of the largest weight."""
    shutil.copyfile(path, target)
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if "exp_probs_b" in tensor.name:
            tensor.data[:] = 0
    reader.data.flush()
    return target


# Not grovemoe: the weights of its chunked experts are those of other experts than the ranking was made by. Not deepseek4: it
# has a table with k experts for each token. Not nemotron_h_moe: its k differ, and llama.cpp overrides single values only.
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"grovemoe", "deepseek4", "nemotron_h_moe"}))
def test_a_skipped_expert_leaves_the_sum(name: str, tmp_path: Path) -> None:
    """To skip all but the first expert is to have a router that chooses one."""
    path = without_selection_bias(tiny_architecture(name, "Q8_0", "Q4_0"), tmp_path / "model.gguf")
    row = ARCHITECTURES[name]
    want = run(path, name, kv_overrides={f"{row.arch or name}.expert_used_count": 1})
    normalised = name not in NOT_NORMALISED and row.arch not in NOT_NORMALISED
    params = OffloadParams(precision_rule="weight", t1=0.0, t2=0.0, renormalize=normalised)
    got, stats = offloaded(path, name, offload=params)
    assert (stats.skips > 0) == (used_in(name, 0) > 1) and stats.loads_low == 0
    for a, b in zip(want, got):
        # Weights that are one, and one but for rounding; a wrong sum is far away (means of 0.1 and more).
        assert np.abs(a - b).max() < 0.1 * a.std() and np.abs(a - b).mean() < 0.005 * a.std()


def test_gains_are_not_renormalised() -> None:
    """Llama 4 multiplies the weights into what the experts see."""
    path = tiny_architecture("llama4", "Q8_0", "Q4_0")
    outs = [
        offloaded(path, "llama4", offload=OffloadParams(precision_rule="weight", t1=0.0, t2=0.0, renormalize=r))[0]
        for r in (False, True)
    ]
    assert same(*outs)


def test_offload_none_is_unpatched(tmp_path: Path) -> None:
    """libllama without our patches gives the same logits for each of them."""
    names = [n for n in sorted(ARCHITECTURES) if not ARCHITECTURES[n].embeddings]
    paths = [tiny_architecture(n) for n in names]
    llm = open_model(paths[0], names[0])
    tokens = words(llm, N_PREFILL)
    llm.close()
    for path, name, theirs in zip(paths, names, stock_logits_of(paths, tokens, 64, tmp_path, 1)):
        assert np.array_equal(theirs, stock(path, name)[0]), name


@pytest.mark.parametrize("offload", [None, "hobbit"])
def test_an_architecture_that_llama_cpp_does_not_know(offload: Optional[str], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_architecture("qwen3moe").read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(ModelFormatError, match="unknown model architecture: 'qwen9moe'"):
        Llama(str(path), offload=offload, verbose=False)


# ---- what is added to a model ----------------------------------------------------------------------------------------


def write_lora(path: Path, model: Path, arch: str, rank: int = 4) -> None:
    """An adapter for the experts' up and down projections and for the attention."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.endswith(("ffn_up_exps.weight", "ffn_down_exps.weight", "attn_q.weight")):
            n_in, n_out, *experts = (int(n) for n in tensor.shape)
            a = rng.standard_normal((*experts, rank, n_in), dtype=np.float32)
            b = rng.standard_normal((*experts, n_out, rank), dtype=np.float32)
            writer.add_tensor(tensor.name + ".lora_a", 0.1 * a)
            writer.add_tensor(tensor.name + ".lora_b", 0.1 * b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LORA = """
import sys
import numpy as np
from decode import load, logits, words
from hobbit_cpp import Llama

path, lora, order = sys.argv[1:]
stock = {}
offloaded = dict(offload="hobbit", exact=True, expert_cache="30%")
for kwargs in (stock, offloaded) if order == "stock-first" else (offloaded, stock):
    llm = load(Llama, path, 1, lora_path=lora, **kwargs)
    tokens = words(llm, 40)
    outs = logits(llm, tokens, 64), logits(llm, tokens, 1)
    kwargs["outs"] = outs
    llm.close()
llm = load(Llama, path, 1)
plain = logits(llm, words(llm, 40), 64)
assert all(np.array_equal(a, b) for a, b in zip(stock["outs"], offloaded["outs"])), "not exact"
assert np.abs(plain - stock["outs"][0]).max() > 0.1, "the adapter does nothing"
"""


@pytest.mark.parametrize("order", ["stock-first", "offloaded-first"])
@pytest.mark.parametrize("name", ["qwen3moe", "llama4"])
def test_lora_on_experts(name: str, order: str, tmp_path: Path) -> None:
    """In a process of its own: llama.cpp looks once at what buffer types there are."""
    path = tiny_architecture(name, "Q8_0")
    write_lora(tmp_path / "lora.gguf", path, name)
    script = [sys.executable, "-W", "ignore", "-c", LORA, str(path), str(tmp_path / "lora.gguf"), order]
    done = subprocess.run(script, cwd=Path(__file__).parent, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_control_vector() -> None:
    path = tiny_architecture("qwen3moe", "Q8_0")
    outs = []
    offload: Dict[str, Any] = {"offload": "hobbit", "exact": True, "expert_cache": small_pool(path)}
    for kwargs in ({}, offload):
        llm = open_model(path, "qwen3moe", **kwargs)
        tokens = words(llm, N_PREFILL)
        plain = logits(llm, tokens, 64)
        n_embd, n_layer = llm.n_embd(), 4
        vector = np.random.default_rng(2).standard_normal(n_embd * (n_layer - 1), dtype=np.float32)
        pointer = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_cpp.llama_set_adapter_cvec(llm._ctx.ctx, pointer, vector.size, n_embd, 1, n_layer) == 0
        outs.append(logits(llm, tokens, 64))
        assert not np.array_equal(plain, outs[-1])
        llm.close()
    assert np.array_equal(outs[0], outs[1])
