#!/usr/bin/env python3
"""Fetch, verify, unpack and patch the pinned upstream; called by CMake at configure time.

The upstream is the source distribution of llama-cpp-python (third_party/llama-cpp-python.pin). What happens, in order:

1. The archive is taken from the cache, or downloaded with pip as pip is configured on this machine; its sha256 is
   compared with the pin. With --source (HOBBIT_LLAMA_CPP_DIR) a tree that is already there is copied instead.
2. The part of the tree that is built is unpacked into a new folder; its digest is compared with the pin.
3. patches/series is applied: every context line must match at exactly the line named, no fuzz, no offset.
4. The folder gets a stamp and is renamed to a name made of a hash of pin and patches. Only then it is used, so a run
   that was interrupted leaves nothing that looks whole. Each later run compares the folder with the stamp.
5. The result is copied to --dest, file by file and only where the bytes differ, so that a build folder that lives
   longer compiles again what changed and nothing else.

The cache is ${HOBBIT_CACHE_DIR:-${XDG_CACHE_HOME:-~/.cache}/hobbit-cpp}; if it cannot be written, --dest is used.
Only the standard library is needed (and pip, for the download), so it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

DIST = "llama-cpp-python"
SDIST_STEM = "llama_cpp_python"
HERE = Path(__file__).resolve().parent

# Raise when the meaning of an unpacked folder changes; folders made by other layouts are then left alone.
LAYOUT = "1"

# What of llama.cpp is built: the library, the CPU backend, and what CMake reads on the way. The rest (other backends,
# tools, tests, models, ...) is neither unpacked nor part of the digest.
KEEP_FILES = ("CMakeLists.txt", "LICENSE", "ggml/CMakeLists.txt")
KEEP_TREES = (
    "cmake/",
    "ggml/cmake/",
    "ggml/include/",
    "ggml/src/ggml-cpu/",
    "include/",
    "licenses/",
    "src/",
    "vendor/",
)
KEEP_FLAT = ("ggml/src/",)  # the files of the folder, not its sub-folders


class FetchError(Exception):
    """Something the person who builds must know; the text says what to do."""


def say(text: str) -> None:
    print(f"-- hobbit upstream: {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------- pin


@dataclass(frozen=True)
class Pin:
    version: str
    sha256: str
    llama_cpp: str
    ggml: str
    tree: str

    @property
    def sdist_name(self) -> str:
        return f"{SDIST_STEM}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    values: Dict[str, str] = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        key, sep, value = line.partition("=")
        if not sep:
            raise FetchError(f"{path}:{number}: expected 'key = value', found {raw!r}")
        values[key.strip()] = value.strip()
    try:
        pin = Pin(values["version"], values["sha256"], values["llama.cpp"], values["ggml"], values["tree"])
    except KeyError as e:
        raise FetchError(f"{path}: no line for {e.args[0]!r}") from None
    for name in ("sha256", "tree"):
        if not re.fullmatch(r"[0-9a-f]{64}", getattr(pin, name)):
            raise FetchError(f"{path}: {name} is not 64 hex digits")
    return pin


# -------------------------------------------------------------------------------------------------------------- trees


def is_kept(rel: str) -> bool:
    """Whether a path relative to the root of llama.cpp belongs to what is built."""
    if rel in KEEP_FILES or rel.startswith(KEEP_TREES):
        return not rel.endswith("/.git") and "/.git/" not in rel
    return any(rel.startswith(d) and "/" not in rel[len(d) :] for d in KEEP_FLAT)


def kept_files(root: Path) -> Iterator[Tuple[str, Path]]:
    """The kept files of a tree, sorted by their relative path."""
    found: List[Tuple[str, Path]] = []
    for folder, subdirs, names in os.walk(root):
        base = Path(folder).relative_to(root).as_posix()
        prefix = "" if base == "." else base + "/"
        subdirs[:] = [d for d in subdirs if d != ".git" and _may_hold_kept(prefix + d + "/")]
        for name in names:
            if is_kept(prefix + name):
                found.append((prefix + name, Path(folder) / name))
    return iter(sorted(found))


def _may_hold_kept(folder: str) -> bool:
    places = KEEP_FILES + KEEP_TREES + KEEP_FLAT
    return folder.startswith(KEEP_TREES) or any(p.startswith(folder) for p in places)


def tree_digest(root: Path) -> str:
    """One sha256 over names and contents of the kept files."""
    total = hashlib.sha256()
    for rel, path in kept_files(root):
        total.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {rel}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    h = hashlib.sha256()
    with path.open("rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()


# ------------------------------------------------------------------------------------------------------------ patches


@dataclass(frozen=True)
class Hunk:
    old_start: int
    old_lines: Tuple[str, ...]
    new_start: int
    new_lines: Tuple[str, ...]
    added: int
    removed: int


@dataclass(frozen=True)
class FilePatch:
    path: str
    hunks: Tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    name: str
    header: str
    files: Tuple[FilePatch, ...]

    @property
    def added(self) -> int:
        return sum(h.added for f in self.files for h in f.hunks)

    @property
    def removed(self) -> int:
        return sum(h.removed for f in self.files for h in f.hunks)


_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_BETWEEN = re.compile(r"(diff --git .*|index [0-9a-f]+\.\.[0-9a-f]+( \d+)?|-- ?|\d+(\.\d+)*( .*)?|)$")


def parse_patch(name: str, text: str) -> Patch:
    """A unified diff over files that exist, with a free header before the first file."""
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    files: List[FilePatch] = []
    at = 0
    while at < len(lines) and not lines[at].startswith(("--- a/", "diff --git ")):
        at += 1
    header = "\n".join(lines[:at]).strip("\n")
    while at < len(lines):
        if not lines[at].startswith("--- "):
            if not _BETWEEN.match(lines[at]):
                raise FetchError(f"{name}:{at + 1}: unexpected line {lines[at]!r}")
            at += 1
            continue
        if at + 1 >= len(lines) or not lines[at + 1].startswith("+++ "):
            raise FetchError(f"{name}:{at + 1}: '---' without '+++'")
        old, new = lines[at][4:].split("\t")[0], lines[at + 1][4:].split("\t")[0]
        if not (old.startswith("a/") and new.startswith("b/") and old[2:] == new[2:]):
            raise FetchError(f"{name}:{at + 1}: a patch changes files, it does not add, remove or rename them")
        path = new[2:]
        if not is_kept(path) or ".." in path.split("/"):
            raise FetchError(f"{name}:{at + 1}: {path} is not a part of the tree that is built")
        at += 2
        hunks: List[Hunk] = []
        while at < len(lines) and lines[at].startswith("@@"):
            m = _HUNK.match(lines[at])
            if not m:
                raise FetchError(f"{name}:{at + 1}: not a hunk header: {lines[at]!r}")
            old_start, old_count = int(m[1]), int(m[2] or "1")
            new_start, new_count = int(m[3]), int(m[4] or "1")
            old_lines: List[str] = []
            new_lines: List[str] = []
            added = removed = 0
            at += 1
            while len(old_lines) < old_count or len(new_lines) < new_count:
                line = lines[at] if at < len(lines) else "end of file"
                if line.startswith(" ") or line == "":
                    old_lines.append(line[1:])
                    new_lines.append(line[1:])
                elif line.startswith("-"):
                    old_lines.append(line[1:])
                    removed += 1
                elif line.startswith("+"):
                    new_lines.append(line[1:])
                    added += 1
                else:
                    raise FetchError(f"{name}:{at + 1}: unexpected line in a hunk: {line!r}")
                at += 1
            if len(old_lines) != old_count or len(new_lines) != new_count:
                raise FetchError(f"{name}:{at}: the hunk does not have the number of lines that its header says")
            hunks.append(Hunk(old_start, tuple(old_lines), new_start, tuple(new_lines), added, removed))
        if not hunks:
            raise FetchError(f"{name}:{at}: no hunk for {path}")
        files.append(FilePatch(path, tuple(hunks)))
    if not files:
        raise FetchError(f"{name}: holds no diff")
    return Patch(name, header, tuple(files))


def apply_to_text(text: str, patch: FilePatch, name: str) -> str:
    """The patched text; every line a hunk names must be there, at the line it names."""
    source = text.split("\n")
    result: List[str] = []
    done = 0  # lines of source that were taken over
    for h in patch.hunks:
        begin = h.old_start - 1 if h.old_lines else h.old_start
        end = begin + len(h.old_lines)
        where = f"{name}: {patch.path}, hunk at line {h.old_start}"
        if begin < done or end > len(source):
            raise FetchError(f"{where}: overlaps the hunk before or lies behind the end of the file")
        for offset, want in enumerate(h.old_lines):
            have = source[begin + offset]
            if have != want:
                raise FetchError(
                    f"{where} does not apply: line {begin + offset + 1} should be\n    {want!r}\nbut is\n    {have!r}\n"
                    "Patches are applied with no fuzz; see patches/README.md for how to make them anew."
                )
        result += source[done:begin]
        if len(result) != (h.new_start - 1 if h.new_lines else h.new_start):
            raise FetchError(f"{where}: would land at line {len(result) + 1}, its header says {h.new_start}")
        result += h.new_lines
        done = end
    return "\n".join(result + source[done:])


def read_series(folder: Path) -> List[Patch]:
    """The patches in the order of the file `series`; a patch that is not listed is an error."""
    series = folder / "series"
    if not series.is_file():
        raise FetchError(f"{series} is missing")
    names = [s for s in (x.split("#", 1)[0].strip() for x in series.read_text(encoding="utf-8").splitlines()) if s]
    stray = sorted({p.name for p in folder.glob("*.patch")} - set(names))
    if stray:
        raise FetchError(f"{series} does not list {', '.join(stray)}")
    patches: List[Patch] = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FetchError(f"{series} lists {name}, which does not exist")
        patches.append(parse_patch(name, path.read_bytes().decode("utf-8")))
    return patches


def apply_series(root: Path, patches: List[Patch], originals: Optional[Path] = None) -> None:
    """Patch a tree of ours; `originals` receives the files as they were before the first patch."""
    for patch in patches:
        for fp in patch.files:
            path = root / fp.path
            if not path.is_file():
                raise FetchError(f"{patch.name}: {fp.path} does not exist in the upstream tree")
            data = path.read_bytes()
            if originals is not None and not (originals / fp.path).exists():
                (originals / fp.path).parent.mkdir(parents=True, exist_ok=True)
                (originals / fp.path).write_bytes(data)
            path.write_bytes(apply_to_text(data.decode("utf-8"), fp, patch.name).encode("utf-8"))
        say(f"applied {patch.name} (+{patch.added} -{patch.removed})")


def series_hash(pin: Pin, patches: List[Patch]) -> str:
    """Names what a tree holds: the pin, and the patches in their order (their diffs, not the prose above them)."""
    h = hashlib.sha256(f"layout {LAYOUT}\n{pin}\n".encode())
    for p in patches:
        h.update(repr(p.files).encode())
    return h.hexdigest()


# --------------------------------------------------------------------------------------------------------- the archive


def pip_command() -> List[str]:
    """A Python with pip: this one, the one this environment was made from, or one on the path."""
    tried: List[str] = []
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, str(base), shutil.which("python3"), shutil.which("python")):
        if not python or python in tried or not os.access(python, os.X_OK):
            continue
        tried.append(python)
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return [python, "-m", "pip"]
    raise FetchError(
        f"no pip found (asked {', '.join(tried)}). Install pip, or unpack {DIST} by hand and name the folder in "
        "HOBBIT_LLAMA_CPP_DIR."
    )


def download(pin: Pin, folder: Path) -> Path:
    """The archive, through pip and its configuration; the hash is checked by the caller."""
    say(f"downloading the source of {DIST} {pin.version} with pip (77 MB)")
    pip = pip_command()
    # --no-binary for this one name: with ":all:" pip would compile the build backend from source as well.
    command = pip + ["download", "--no-deps", "--no-binary", DIST, "--dest", str(folder), "--progress-bar", "off"]
    check = [pip[0], "-c", "import scikit_build_core"]
    if subprocess.run(check, capture_output=True).returncode == 0:
        command.append("--no-build-isolation")  # pip asks the backend for the metadata: the one we have will do
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    env.pop("CMAKE_ARGS", None)
    done = subprocess.run(
        command + [f"{DIST}=={pin.version}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    path = folder / pin.sdist_name
    if done.returncode != 0 or not path.is_file():
        tail = "\n".join("    " + line for line in done.stdout.splitlines()[-15:])
        raise FetchError(
            f"pip could not download {DIST}=={pin.version} (exit {done.returncode}):\n{tail}\n"
            "If this machine has no network, unpack that source distribution (or the llama.cpp of the same commit, "
            f"{pin.llama_cpp}) by hand and set HOBBIT_LLAMA_CPP_DIR to the folder."
        )
    return path


def verified_archive(pin: Pin, cache: Path) -> Path:
    folder = cache / "downloads"
    path = folder / pin.sdist_name
    if path.is_file():
        if file_sha256(path) == pin.sha256:
            say(f"archive found: {path}")
            return path
        say(f"archive in the cache has another sha256, fetching it again: {path}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(folder), prefix="part-") as part:
        got = download(pin, Path(part))
        have = file_sha256(got)
        if have != pin.sha256:
            raise FetchError(
                f"{pin.sdist_name} as downloaded has sha256\n    {have}\nbut the pin says\n    {pin.sha256}\n"
                "Nothing was built from it."
            )
        os.replace(got, path)
    say("sha256 is the pinned one")
    return path


def unpack(archive: Path, pin: Pin, root: Path) -> None:
    prefix = f"{SDIST_STEM}-{pin.version}/vendor/llama.cpp/"
    count = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            rel = member.name[len(prefix) :]
            if not member.name.startswith(prefix) or not member.isfile() or not is_kept(rel):
                continue
            if ".." in rel.split("/"):
                raise FetchError(f"{archive}: refused the path {member.name}")
            stream = tar.extractfile(member)
            assert stream is not None
            target = root / rel
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out)
            count += 1
    say(f"unpacked {count} files")


def find_llama_cpp(source: Path) -> Path:
    """The llama.cpp in a folder that is llama.cpp or an unpacked llama-cpp-python."""
    for root in (source, source / "vendor" / "llama.cpp"):
        if (root / "src" / "llama.cpp").is_file() and (root / "ggml" / "CMakeLists.txt").is_file():
            return root
    raise FetchError(f"HOBBIT_LLAMA_CPP_DIR={source} holds neither llama.cpp nor an unpacked {DIST}")


def copy_source(source: Path, root: Path) -> None:
    upstream = find_llama_cpp(source)
    say(f"copying {upstream}")
    for rel, path in kept_files(upstream):
        (root / rel).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / rel)


# ------------------------------------------------------------------------------------------------------- whole folders


def stamp_is_good(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
        return bool(stamp["digest"] == tree_digest(folder / "llama.cpp") + tree_digest(folder / "originals"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_tree(pin: Pin, patches: List[Patch], name: str, cache: Path, source: Optional[Path]) -> Path:
    """The folder of the patched tree: found whole in the cache, or made."""
    final = cache / "upstream" / name
    if final.is_dir():
        if stamp_is_good(final):
            say(f"tree found: {final}")
            return final
        say(f"tree in the cache is not whole, making it again: {final}")
        shutil.rmtree(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(final.parent), prefix="part-") as part:
        work = Path(part) / "tree"
        root = work / "llama.cpp"
        root.mkdir(parents=True)
        (work / "originals").mkdir()
        if source is not None:
            copy_source(source, root)
        else:
            unpack(verified_archive(pin, cache), pin, root)
        have = tree_digest(root)
        if have != pin.tree:
            where = f"HOBBIT_LLAMA_CPP_DIR={source}" if source is not None else pin.sdist_name
            raise FetchError(
                f"{where} is not the pinned llama.cpp {pin.llama_cpp} (of {DIST} {pin.version}), or was changed: its "
                f"digest is\n    {have}\nbut the pin says\n    {pin.tree}"
            )
        apply_series(root, patches, work / "originals")
        digest = tree_digest(root) + tree_digest(work / "originals")
        (work / "stamp.json").write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
        try:
            os.rename(work, final)
        except OSError:
            if not stamp_is_good(final):  # else: somebody else made it at the same time
                raise
    say(f"tree made: {final}")
    return final


def sync(source: Path, dest: Path) -> int:
    """Make dest equal to source and leave files that are equal untouched; returns how many changed."""
    wanted = {p.relative_to(source).as_posix(): p for p in source.rglob("*") if p.is_file()}
    changed = 0
    if dest.is_dir():
        for path in list(dest.rglob("*")):
            if path.is_file() and path.relative_to(dest).as_posix() not in wanted:
                path.unlink()
                changed += 1
    for rel, path in wanted.items():
        target = dest / rel
        data = path.read_bytes()
        if target.is_file() and target.read_bytes() == data:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        changed += 1
    return changed


def cmake_facts(pin: Pin, patches: List[Patch], name: str) -> str:
    files = sorted({f.path for p in patches for f in p.files})
    identity = ",".join([p.name[: -len(".patch")] for p in patches] + [name[:12]])
    return (
        "# written by third_party/fetch_upstream.py\n"
        f'set(HOBBIT_UPSTREAM_VERSION "{pin.version}")\n'
        f'set(HOBBIT_UPSTREAM_COMMIT "{pin.llama_cpp}")\n'
        f'set(HOBBIT_UPSTREAM_GGML "{pin.ggml}")\n'
        f'set(HOBBIT_PATCHES "{identity}")\n'
        f'set(HOBBIT_PATCHED_FILES "{";".join(files)}")\n'
    )


def default_cache() -> Path:
    named = os.environ.get("HOBBIT_CACHE_DIR")
    if named:
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "hobbit-cpp"


def usable_cache(dest: Path) -> Path:
    try:
        cache = default_cache()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(cache)):
            pass
        return cache
    except (OSError, RuntimeError) as e:
        say(f"the cache cannot be used ({e}), working in the build folder")
        return dest / "cache"


def new_pin(version: str) -> str:
    """The pin for another version, for a person to read and to put into place."""
    pin = Pin(version, "0" * 64, "unknown", "unknown", "0" * 64)
    with tempfile.TemporaryDirectory(prefix="hobbit-pin-") as part:
        archive = download(pin, Path(part))
        root = Path(part) / "llama.cpp"
        unpack(archive, pin, root)
        commit = "unknown"
        with tarfile.open(archive, "r:gz") as tar:
            log = tar.extractfile(f"{SDIST_STEM}-{version}/CHANGELOG.md")
            found = re.search(r"ggml-org/llama\.cpp@([0-9a-f]+)", log.read().decode("utf-8")) if log else None
            commit = found[1] if found else commit
        text = (root / "ggml" / "CMakeLists.txt").read_text(encoding="utf-8")
        numbers = [re.search(rf"GGML_VERSION_{part_} (\d+)", text) for part_ in ("MAJOR", "MINOR", "PATCH")]
        ggml = ".".join(m[1] if m else "?" for m in numbers)
        return (
            f"version = {version}\nsha256 = {file_sha256(archive)}\nllama.cpp = {commit}\nggml = {ggml}\n"
            f"tree = {tree_digest(root)}\n"
        )


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pin", type=Path, default=HERE / "llama-cpp-python.pin")
    parser.add_argument("--patches", type=Path, default=HERE.parent / "patches")
    parser.add_argument("--dest", type=Path, help="folder that receives llama.cpp/, originals/ and upstream.cmake")
    parser.add_argument("--source", type=Path, help="a llama.cpp that is already there (HOBBIT_LLAMA_CPP_DIR)")
    parser.add_argument("--new-pin", metavar="VERSION", help="print the pin of another version and stop")
    parser.add_argument("--pristine", action="store_true", help="apply no patches")
    args = parser.parse_args(argv)
    try:
        if args.new_pin:
            print(new_pin(args.new_pin))
            return 0
        if args.dest is None:
            parser.error("--dest is needed")
        pin = read_pin(args.pin)
        patches = [] if args.pristine else read_series(args.patches)
        name = series_hash(pin, patches)
        args.dest.mkdir(parents=True, exist_ok=True)
        tree = make_tree(pin, patches, name, usable_cache(args.dest), args.source)
        if (args.dest / "upstream.cmake").exists():  # written last: without it the folder is not whole
            (args.dest / "upstream.cmake").unlink()
        changed = sum(sync(tree / part, args.dest / part) for part in ("llama.cpp", "originals"))
        (args.dest / "upstream.cmake").write_text(cmake_facts(pin, patches, name), encoding="utf-8")
        say(f"{DIST} {pin.version}, llama.cpp {pin.llama_cpp}, {len(patches)} patches; {changed} files changed")
        return 0
    except FetchError as e:
        print(f"hobbit upstream: error: {e}", file=sys.stderr)
    except OSError as e:
        hint = " (the disk is full: 150 MB are needed)" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"hobbit upstream: error: {e}{hint}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
