"""llama-cpp-python's own tests pass with our `Llama` in the place of its own.

They come out of the pinned, verified source distribution at every run, and are in no folder of ours; upstream_plugin.py says
which are left out, and why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "third_party")]

import fetch_upstream  # noqa: E402

VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pin = fetch_upstream.read_pin(ROOT / "third_party" / "llama-cpp-python.pin")
    try:
        archive = fetch_upstream.verified_archive(pin, fetch_upstream.default_cache())
    except fetch_upstream.FetchError as e:
        pytest.skip(f"the source distribution of llama-cpp-python cannot be had: {e}")
    folder = tmp_path_factory.mktemp("upstream")
    top = f"{fetch_upstream.SDIST_STEM}-{pin.version}/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name[len(top) :]
            if member.isfile() and (name == VOCABULARY or re.fullmatch(r"tests/\w+\.py", name)):
                source = tar.extractfile(member)
                assert source is not None
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.read())
    return folder


@pytest.mark.parametrize("offload", ["", "hobbit"])
def test_upstreams_tests_pass(suite: Path, offload: str) -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-p", "upstream_plugin", "-p", "no:cacheprovider", "-q", "-rA"]
    paths = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = dict(os.environ, HOBBIT_TEST_OFFLOAD=offload, PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = set(re.findall(r"^PASSED (\S+)", done.stdout, re.M))
    # What must not disappear by an accident.
    for name in ("llama_cpp_tokenization", "real_llama_embeddings", "grammar_from_string", "mistral_instruct"):
        assert any(p.endswith(f"::test_{name}") for p in passed), name
    for name in ("exact_cached_prompt", "loaded_exact_cached_prompt", "ram_cache_exact_prompt_hit", "shorter_prompt_prefix"):
        assert any(f"::test_{name}" in p and "transformer" in p for p in passed), name
