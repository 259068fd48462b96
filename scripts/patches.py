#!/usr/bin/env python3
"""Work on the patches: patches.py check | edit DIR | save DIR (see patches/README.md). edit and save need git."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
sys.path.insert(0, str(ROOT / "third_party"))

import fetch_upstream as upstream  # noqa: E402

MAX_PATCHES = 3
MAX_ADDED = 120
FIELDS = ("Why", "Why-not-without", "When-unused", "Remove-when", "Test")


def header_fields(header: str) -> Dict[str, str]:
    """`Name: text` with text going on over the lines that do not begin another field."""
    fields: Dict[str, str] = {}
    name = ""
    for line in header.splitlines():
        m = re.match(r"([A-Z][a-z]+(?:-[a-z]+)*): *(.*)$", line)
        if m:
            name = m[1]
            fields[name] = m[2]
        elif name:
            fields[name] = f"{fields[name]} {line.strip()}".strip()
    return fields


def problems(patches: List[upstream.Patch]) -> List[str]:
    """What in the series breaks a rule of patches/README.md, apart from whether it applies."""
    found: List[str] = []
    if len(patches) > MAX_PATCHES:
        found.append(f"{len(patches)} patches, at most {MAX_PATCHES} are allowed")
    added = sum(p.added for p in patches)
    if added > MAX_ADDED:
        found.append(f"{added} added lines in all, at most {MAX_ADDED} are allowed")
    for p in patches:
        fields = header_fields(p.header)
        found += [f"{p.name}: no '{f}:' in its header" for f in FIELDS if not fields.get(f)]
        found += [
            f"{p.name}: changes {f.path}, only src/*.cpp may be changed"
            for f in p.files
            if not re.fullmatch(r"src/[^/]+\.cpp", f.path)
        ]
        test = fields.get("Test", "").split("::")[0].split()
        if test and not (ROOT / test[0]).is_file():
            found.append(f"{p.name}: its test {test[0]} does not exist")
    return found


def pristine_tree(dest: Path) -> Path:
    """The pinned llama.cpp without patches."""
    status = upstream.main(["--pristine", "--dest", str(dest)])
    if status:
        sys.exit(status)
    return dest / "llama.cpp"


def git(folder: Path, *arguments: str, text: str = "") -> str:
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        env.pop(name, None)
    command = ["git", "-c", "user.name=hobbit", "-c", "user.email=hobbit@localhost", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, input=text, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def check() -> int:
    patches = upstream.read_series(PATCHES)
    with tempfile.TemporaryDirectory(prefix="hobbit-patches-") as part:
        upstream.apply_series(pristine_tree(Path(part)), patches)
    found = problems(patches)
    for text in found:
        print(text)
    added, removed = sum(p.added for p in patches), sum(p.removed for p in patches)
    print(f"{len(patches)} patches, {added} lines added, {removed} removed")
    return 1 if found else 0


def edit(folder: Path) -> int:
    if folder.exists():
        sys.exit(f"{folder} exists already")
    with tempfile.TemporaryDirectory(prefix="hobbit-patches-") as part:
        upstream.sync(pristine_tree(Path(part)), folder)
    git(folder, "init", "-q")
    git(folder, "add", "-Af")
    git(folder, "commit", "-q", "-m", "pinned upstream")
    git(folder, "tag", "pinned")
    for p in upstream.read_series(PATCHES):
        upstream.apply_series(folder, [p])
        message = f"{p.header}\n\nPatch-file: {p.name}\n"
        git(folder, "commit", "-q", "-a", "--cleanup=verbatim", "-F", "-", text=message)
    print(f"{folder}: each patch is a commit on the tag 'pinned'; then: patches.py save {folder}")
    return 0


def save(folder: Path) -> int:
    if git(folder, "status", "--porcelain", "--untracked-files=no").strip():
        sys.exit(f"{folder} has changes that are not committed")
    commits = git(folder, "rev-list", "--reverse", "pinned..HEAD").split()
    texts: Dict[str, str] = {}
    for number, commit in enumerate(commits, 1):
        message = git(folder, "log", "-1", "--format=%B", commit)
        named = re.search(r"^Patch-file: (\S+)\n*", message, flags=re.MULTILINE)
        title = re.sub(r"[^a-z0-9]+", "-", message.splitlines()[0].lower()).strip("-")[:50].strip("-")
        name = named[1] if named else f"{number:04d}-{title}.patch"
        if named:
            message = message.replace(named[0], "")
        diff = git(folder, "-c", "core.abbrev=10", "diff", "--no-color", "--no-ext-diff", f"{commit}^", commit)
        texts[name] = message.strip("\n") + "\n\n" + diff
        upstream.parse_patch(name, texts[name])
    for old in PATCHES.glob("*.patch"):
        old.unlink()
    for name, text in texts.items():
        (PATCHES / name).write_text(text, encoding="utf-8")
    comments = [x for x in (PATCHES / "series").read_text(encoding="utf-8").splitlines() if x.startswith("#")]
    (PATCHES / "series").write_text("\n".join(comments + list(texts)) + "\n", encoding="utf-8")
    print("\n".join(texts) or "no patches")
    return check()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("edit").add_argument("dir", type=Path)
    commands.add_parser("save").add_argument("dir", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "check":
            return check()
        return edit(args.dir.resolve()) if args.command == "edit" else save(args.dir.resolve())
    except upstream.FetchError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
