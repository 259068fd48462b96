"""The patches on llama.cpp: they apply exactly, stay small and say why; and the code that applies them is strict."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "third_party"), str(ROOT / "scripts")]

import fetch_upstream as upstream  # noqa: E402
import patches as tool  # noqa: E402

OLD = "one\ntwo\nthree\nfour\nfive\n"
DIFF = """\
Adds a line

Why: to test

diff --git a/src/x.cpp b/src/x.cpp
index 0123456..789abcd 100644
--- a/src/x.cpp
+++ b/src/x.cpp
@@ -2,3 +2,4 @@ void f() {
 two
 three
+three and a half
 four
"""


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tool.pristine_tree(tmp_path_factory.mktemp("pristine"))


def apply(diff: str, text: str = OLD) -> str:
    patch = upstream.parse_patch("x.patch", diff)
    for fp in patch.files:
        text = upstream.apply_to_text(text, fp, patch.name)
    return text


# ---- ours


def test_series_applies_with_no_fuzz(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "tree")
    upstream.apply_series(tmp_path / "tree", upstream.read_series(ROOT / "patches"))


def test_series_obeys_the_rules_of_its_readme() -> None:
    assert tool.problems(upstream.read_series(ROOT / "patches")) == []


def test_series_only_adds_as_far_as_possible() -> None:
    patches = upstream.read_series(ROOT / "patches")
    added, removed = sum(p.added for p in patches), sum(p.removed for p in patches)
    assert removed <= added // 10, "patches are additions; lines that are removed must stay the exception"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_agrees_with_our_applier(pristine: Path, tmp_path: Path) -> None:
    series = upstream.read_series(ROOT / "patches")
    shutil.copytree(pristine, tmp_path / "ours")
    upstream.apply_series(tmp_path / "ours", series)
    shutil.copytree(pristine, tmp_path / "gits")
    for p in series:
        text = (ROOT / "patches" / p.name).read_text(encoding="utf-8")
        tool.git(tmp_path / "gits", "apply", "-", text=text)
    # git apply can skip a patch and exit with 0: only the digests tell
    assert upstream.tree_digest(tmp_path / "ours") == upstream.tree_digest(tmp_path / "gits")


# ---- the applier


def test_a_hunk_lands_where_its_header_says() -> None:
    assert apply(DIFF) == "one\ntwo\nthree\nthree and a half\nfour\nfive\n"


def test_context_that_differs_is_refused_with_both_lines() -> None:
    with pytest.raises(upstream.FetchError, match=r"(?s)line 3 should be.*'three'.*but is.*'3'"):
        apply(DIFF, OLD.replace("three", "3"))


def test_an_offset_is_refused() -> None:
    with pytest.raises(upstream.FetchError, match="does not apply"):
        apply(DIFF, "zero\n" + OLD)


def test_white_space_counts() -> None:
    with pytest.raises(upstream.FetchError, match="does not apply"):
        apply(DIFF, OLD.replace("four", "four "))


def test_a_hunk_behind_the_end_is_refused() -> None:
    with pytest.raises(upstream.FetchError, match="behind the end"):
        apply(DIFF, "one\ntwo\n")


@pytest.mark.parametrize(
    "broken",
    [
        DIFF.replace("@@ -2,3 +2,4 @@", "@@ -2,3 +2,5 @@"),  # a line is missing
        DIFF.replace("@@ -2,3 +2,4 @@", "@@ -2,3 +3,4 @@"),  # lands elsewhere
        DIFF + "and more\n",
        DIFF.replace("+++ b/src/x.cpp", "+++ b/src/y.cpp"),
        DIFF.replace("--- a/src/x.cpp", "--- /dev/null"),
        DIFF.replace("src/x.cpp", "tools/x.cpp"),
        DIFF.replace("src/x.cpp", "src/../../x.cpp"),
        "no diff at all\n",
    ],
)
def test_a_broken_patch_is_refused(broken: str) -> None:
    with pytest.raises(upstream.FetchError):
        apply(broken)


def series_of(folder: Path, names: List[str], listed: List[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(DIFF, encoding="utf-8")
    (folder / "series").write_text("# order\n" + "".join(f"{n}\n" for n in listed), encoding="utf-8")
    return folder


def test_a_patch_outside_of_the_series_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(upstream.FetchError, match=r"does not list b\.patch"):
        upstream.read_series(series_of(tmp_path / "p", ["a.patch", "b.patch"], ["a.patch"]))


def test_a_patch_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(upstream.FetchError, match=r"lists b\.patch, which does not exist"):
        upstream.read_series(series_of(tmp_path / "p", ["a.patch"], ["a.patch", "b.patch"]))


def test_the_rules_name_what_is_missing() -> None:
    found = tool.problems([upstream.parse_patch("x.patch", DIFF)])
    assert any("Remove-when" in text for text in found)
    assert not any("'Why:'" in text for text in found)


# ---- the folder


def run_fetch(dest: Path, cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "third_party" / "fetch_upstream.py"), "--dest", str(dest), *more]
    env = {"HOBBIT_CACHE_DIR": str(cache), "PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "HOME": str(cache)}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_tree_that_is_there_is_copied_and_never_written_to(pristine: Path, tmp_path: Path) -> None:
    before = upstream.tree_digest(pristine)
    done = run_fetch(tmp_path / "dest", tmp_path / "cache", "--source", str(pristine))
    assert done.returncode == 0, done.stdout
    assert upstream.tree_digest(pristine) == before
    assert (tmp_path / "dest" / "llama.cpp" / "src" / "llama.cpp").is_file()
    again = run_fetch(tmp_path / "dest", tmp_path / "cache", "--source", str(pristine))
    assert "; 0 files changed" in again.stdout


def test_a_damaged_cache_is_noticed_and_made_again(pristine: Path, tmp_path: Path) -> None:
    run_fetch(tmp_path / "dest", tmp_path / "cache", "--source", str(pristine))
    victim = next((tmp_path / "cache" / "upstream").glob("*/llama.cpp/src/llama.cpp"))
    victim.write_text("// damaged\n", encoding="utf-8")
    done = run_fetch(tmp_path / "other", tmp_path / "cache", "--source", str(pristine))
    assert done.returncode == 0 and "not whole" in done.stdout
    first, second = (upstream.tree_digest(tmp_path / d / "llama.cpp") for d in ("dest", "other"))
    assert first == second


def test_another_llama_cpp_is_refused(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "changed")
    with (tmp_path / "changed" / "src" / "llama.cpp").open("a", encoding="utf-8") as f:
        f.write("// another commit\n")
    done = run_fetch(tmp_path / "dest", tmp_path / "cache", "--source", str(tmp_path / "changed"))
    assert done.returncode == 1 and "is not the pinned llama.cpp" in done.stdout
    assert not list((tmp_path / "cache" / "upstream").glob("*")), "nothing may be left that looks whole"


def test_without_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    done = run_fetch(tmp_path / "dest", tmp_path / "cache")
    assert done.returncode == 1
    assert "pip could not download" in done.stdout and "HOBBIT_LLAMA_CPP_DIR" in done.stdout


def test_an_archive_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = upstream.read_pin(ROOT / "third_party" / "llama-cpp-python.pin")

    def other(pin: upstream.Pin, folder: Path) -> Path:
        (folder / pin.sdist_name).write_bytes(b"something else")
        return folder / pin.sdist_name

    monkeypatch.setattr(upstream, "download", other)
    with pytest.raises(upstream.FetchError, match="sha256"):
        upstream.verified_archive(pin, tmp_path)
    assert not (tmp_path / "downloads" / pin.sdist_name).exists()
