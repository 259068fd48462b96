"""hobbit inspect: what a GGUF holds, from its header."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

import tiny_models
from gguf_files import make_model, run_cli
from hobbit_cpp import Llama, ModelFormatError, OffloadParams
from hobbit_cpp._session import Session
from hobbit_cpp.cli import main
from hobbit_cpp.convert import ConvertError, convert
from hobbit_cpp.inspection import inspect_file
from models import tiny, tiny_architecture, tiny_dual
from tiny_models import SHAPES

Captured = pytest.CaptureFixture[str]

KEYS = {
    "format", "kind", "files", "bytes", "name", "architecture", "layers", "context_length", "moe", "moe_layers", "experts",
    "experts_used", "shared_experts", "bytes_dense", "bytes_high", "bytes_low", "bytes_expert_high", "bytes_expert_low",
    "bytes_cycle_high", "bytes_cycle_low", "types", "low", "sidecar", "offload", "direct_io", "kv_bytes_per_1k_tokens",
    "budgets", "calibration",
}  # fmt: skip


def as_json(path: Path, capsys: Captured, *flags: str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json", *flags]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(facts) == KEYS and facts["format"] == 1
    return facts


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_it_says_what_the_engine_sees(shape: str, capsys: Captured) -> None:
    path = tiny_dual(shape)
    facts = as_json(path, capsys)
    session = Session(str(path), OffloadParams())
    info = session.info
    assert facts["kind"] == "model" and facts["moe"] and facts["low"] == "file" and facts["sidecar"] is None
    assert facts["offload"] == {"possible": True, "reason": None}
    pairs = {
        "layers": "n_layer", "moe_layers": "n_moe_layer", "experts": "n_expert", "experts_used": "n_expert_used",
        "bytes_dense": "bytes_dense", "bytes_high": "bytes_high", "bytes_low": "bytes_low",
        "bytes_expert_high": "bytes_expert_high", "bytes_expert_low": "bytes_expert_low", "bytes_cycle_high": "bytes_cycle",
    }  # fmt: skip
    for ours, theirs in pairs.items():
        assert facts[ours] == getattr(info, theirs), ours
    assert facts["bytes_cycle_low"] == info.n_moe_layer * info.n_expert_used * info.bytes_expert_low
    assert facts["shared_experts"] == (1 if shape == "deepseek2" else 0)
    assert [t["type"] for t in facts["types"]["high"]] == ["Q8_0"]
    for role in ("dense", "high", "low"):
        rows = facts["types"][role]
        assert sum(row["bytes"] for row in rows) == facts[f"bytes_{role}"]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    io = facts["direct_io"]
    assert io["alignment"] == (info.io_alignment if info.direct_io else 1)
    n = 2 * sum(len(names) for names in ({"gate", "up", "down"},)) * info.n_moe_layer * info.n_expert
    assert io["slices"] == io["slices_aligned"] == n and io["read_beyond"] == 0  # 256 x 256 weights


@pytest.mark.parametrize("name", ["grovemoe", "nemotron_h_moe"])
def test_layers_that_differ(name: str) -> None:
    """In how many experts they have, and how many of them a token uses."""
    path = tiny_architecture(name, "Q8_0", "Q4_0")
    facts = inspect_file(path)
    session = Session(str(path), OffloadParams())
    info = session.info
    session.close()
    assert facts["experts_used"] == info.n_expert_used > 0
    assert facts["bytes_cycle_high"] == info.bytes_cycle > facts["bytes_cycle_low"] > info.bytes_cycle // 3


def test_slices_that_are_not_aligned_are_counted(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf")  # rows of 96: slices of 49152 bytes, at multiples of 32 only
    io = inspect_file(path)["direct_io"]
    if io["alignment"] == 1:
        pytest.skip("no direct reads here")
    assert io["slices"] == 24 and 0 < io["read_beyond"] <= io["alignment"] / 49152
    made = convert(path, tmp_path / "c.gguf", low=None).path
    assert inspect_file(made)["direct_io"]["slices_aligned"] == 24


@pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
@pytest.mark.parametrize("shape", ["mixtral", "deepseek2"])
def test_kv_cache_and_budgets_are_those_of_the_model(shape: str) -> None:
    path = tiny(shape, "Q8_0")
    facts = inspect_file(path)
    budgets = facts["budgets"]
    n_ctx = budgets["n_ctx"]
    assert n_ctx == 512  # all that the model takes
    order = ["smallest", "one_cycle", "experts_50_percent", "experts_100_percent"]
    assert [budgets[k] for k in order] == sorted(budgets[k] for k in order)
    # 4 layers, head size 64, keys and values of 2 heads; deepseek2: keys of 64 + 16 latent
    assert facts["kv_bytes_per_1k_tokens"] == 1024 * 4 * 2 * (2 * 2 * 64 if shape == "mixtral" else 80)


@pytest.mark.no_asan
@pytest.mark.parametrize("shape", ["mixtral", "deepseek2"])
def test_the_smallest_budget_is_enough_and_much_less_is_not(shape: str) -> None:
    """In a process of its own: what a long test session holds counts as well."""
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from hobbit_cpp import Llama, MemoryBudgetError\n"
        "from hobbit_cpp.inspection import inspect_file\n"
        f"path = {str(tiny(shape, 'Q8_0'))!r}\n"
        "budgets = inspect_file(path)['budgets']\n"
        "for less in (0, 24 << 20):\n"
        "    try:\n"
        "        memory = budgets['smallest'] - less\n"
        "        Llama(path, offload='hobbit', memory=memory, n_ctx=budgets['n_ctx'], verbose=False).close()\n"
        "        print('loads')\n"
        "    except MemoryBudgetError:\n"
        "        print('refused')\n"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["loads", "refused"]


def test_a_split_model_with_a_sidecar(tmp_path: Path, capsys: Captured) -> None:
    parts = convert(tiny("qwen3moe", "Q8_0"), tmp_path / "s.gguf", low=None, split_max_bytes=1 << 20).paths
    facts = as_json(parts[0], capsys)
    assert facts["files"] == [str(p) for p in parts] and facts["bytes"] == sum(p.stat().st_size for p in parts)
    assert facts["low"] == "none" and facts["bytes_low"] == 0
    low = convert(parts[0], sidecar=True, low="Q4_0").path
    facts = as_json(parts[2], capsys)  # any part will do
    assert facts["low"] == "sidecar" and facts["sidecar"] == {"path": str(low), "belongs": True, "reason": None}
    assert facts["bytes_low"] > 0 and [t["type"] for t in facts["types"]["low"]] == ["Q4_0"]
    assert as_json(parts[0], capsys, "--low-model", "none")["low"] == "none"
    main(["inspect", str(parts[0])])
    assert f"in {len(parts)} parts" in capsys.readouterr().out


def test_a_sidecar_that_does_not_belong_is_told(tmp_path: Path, capsys: Captured) -> None:
    tiny_models.write_tiny(tmp_path / "other.gguf", "qwen3moe", expert_type="Q8_0", seed=3)
    convert(tmp_path / "other.gguf", tmp_path / "m.low.gguf", sidecar=True)
    path = Path(shutil.copy(tiny("qwen3moe", "Q8_0"), tmp_path / "m.gguf"))
    facts = as_json(path, capsys)
    assert facts["low"] == "none" and facts["bytes_low"] == 0 and facts["offload"]["possible"]
    assert facts["sidecar"]["belongs"] is False and "does not belong" in facts["sidecar"]["reason"]
    assert main(["inspect", str(path)]) == 0
    assert "does not belong" in capsys.readouterr().out
    # and of itself it says what it is
    facts = as_json(tmp_path / "m.low.gguf", capsys)
    assert facts["kind"] == "sidecar" and facts["bytes_low"] > 0 and not facts["offload"]["possible"]
    assert main(["inspect", str(tmp_path / "m.low.gguf")]) == 0
    assert "sidecar: the low-precision copies" in capsys.readouterr().out


def test_a_dense_model_says_so(tmp_path: Path, capsys: Captured) -> None:
    path = make_model(tmp_path / "dense.gguf", moe=False)
    facts = as_json(path, capsys)
    assert facts["moe"] is False and facts["moe_layers"] == facts["experts"] == facts["bytes_high"] == 0
    assert facts["offload"] == {"possible": False, "reason": "a dense model: there are no routed experts to offload"}
    assert facts["budgets"] is None and facts["direct_io"] is None
    assert main(["inspect", str(path)]) == 0
    assert "a dense model" in capsys.readouterr().out


def test_a_model_that_cannot_be_offloaded_is_described_with_the_reason(tmp_path: Path, capsys: Captured) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")  # no expert_used_count
    for tensor in gguf.GGUFReader(make_model(tmp_path / "x.gguf")).tensors:
        w.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    facts = as_json(tmp_path / "m.gguf", capsys)
    assert facts["moe"] and facts["experts"] == 4 and "expert_used_count" in facts["offload"]["reason"]
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "not possible" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "number", "says"),
    [
        ("expert_count", None, "expert_count"),
        ("expert_count", 100_000, "at most 1024"),
        ("block_count", 100_000, r"layers \(block_count\); llama.cpp takes 1 to 512"),
    ],
)
def test_metadata_that_would_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, number: int | None, says: str
) -> None:
    add = getattr(gguf.GGUFWriter, f"add_{key}")
    monkeypatch.setattr(gguf.GGUFWriter, f"add_{key}", lambda self, _: None if number is None else add(self, number))
    path = make_model(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ModelFormatError, match=says):
        Llama(str(path), offload="hobbit", verbose=False)
    facts = inspect_file(path)
    assert not facts["offload"]["possible"] and facts["budgets"] is None
    done = run_cli("plan", str(path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and key in done.stderr


def test_what_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    for path, message in ((tmp_path / "x", "not a GGUF"), (tmp_path / "missing", "cannot read"), (tmp_path, "not a file")):
        done = run_cli("inspect", str(path))
        assert done.returncode == 1 and done.stdout == "" and message in done.stderr and done.stderr.count("\n") == 1
    data = tiny("mixtral").read_bytes()
    (tmp_path / "cut").write_bytes(data[:1000])
    with pytest.raises(ConvertError, match=r"corrupt GGUF header|truncated"):
        inspect_file(tmp_path / "cut")
    # the header is enough: of a download that has just begun
    (tmp_path / "cut").write_bytes(data[:100_000])
    facts = inspect_file(tmp_path / "cut")
    assert facts["bytes_high"] == inspect_file(tiny("mixtral"))["bytes_high"]
    assert not facts["offload"]["possible"] and "cut short" in facts["offload"]["reason"]


def test_where_json_goes(tmp_path: Path, capsys: Captured) -> None:
    path, out = tiny_dual("mixtral"), tmp_path / "facts.json"
    facts = as_json(path, capsys)
    assert main(["inspect", str(path), "--json", str(out)]) == 0
    facts.pop("budgets")  # count what this process happens to hold
    assert capsys.readouterr().out == "" and facts.items() <= json.loads(out.read_text()).items()
    assert main(["inspect", "--json", str(path)]) == 0  # the other way round
    assert facts.items() <= json.loads(capsys.readouterr().out).items()
    model = Path(shutil.copy(path, tmp_path / "m.gguf"))
    assert main(["inspect", str(path), "--json", str(model)]) == 1
    assert "would be replaced" in capsys.readouterr().err and model.read_bytes()[:4] == b"GGUF"
    assert main(["inspect"]) == 2


def test_the_table_is_readable(capsys: Captured) -> None:
    assert main(["inspect", str(tiny_dual("deepseek2"))]) == 0
    out = capsys.readouterr().out
    for text in ("deepseek2 (tiny deepseek2)", "4, 3 with experts", "8 in a layer, 2 for each token, 1 shared", "Q8_0 100%",
                 "KV cache", "slices aligned", "smallest", "all experts"):  # fmt: skip
        assert text in out, text
    assert "\x1b" not in out


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = make_model(tmp_path / "big.gguf", ff=3072)
    before = _read()
    inspect_file(path)
    assert _read() - before < path.stat().st_size


def _read() -> int:
    """What this process has read, from the page cache or not."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("rchar")))
