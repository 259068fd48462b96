"""Which experts of a model are hot, kept between runs, so that the first tokens find them in memory.

`heat/<fingerprint>.bin` in the cache folder ($HOBBIT_CACHE_DIR, else hobbit-cpp/ of the user's cache folder), little-endian:

    8 bytes   "HOBHEAT" and the version of the format
    u32, u32  MoE layers, experts of a layer
    float32   [layers][experts][2]: uses a token over the last hundred tokens or so; the share of the last uses that needed high
              precision
    u32       CRC-32 of all before it

That is how often each expert was used, and nothing of the text. The fingerprint is that of the model's experts
(csrc/io/fingerprint.h).
Nothing here is ever a reason to fail: what cannot be read, is damaged or belongs to another model is not used, what cannot be
written is not kept. HOBBIT_HEAT=0 in the environment switches it off.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Callable, Optional

from ._files import replacing

__all__ = ["MAX_FILES", "HeatFile", "cache_folder", "wanted"]

MAX_FILES = 64
"""Those of the models that were used last stay: some MB."""
SAVE_SECONDS = 180.0
"""What a run that is killed has learned since is lost."""

_HEAD = struct.Struct("<7sBII")
_VERSION = 1


def cache_folder() -> Path:
    """$HOBBIT_CACHE_DIR, else hobbit-cpp/ of the user's cache folder."""
    given = os.environ.get("HOBBIT_CACHE_DIR")
    # os.path leaves "~" as it is where there is no home.
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hobbit-cpp")


def wanted(params_heat: bool) -> bool:
    """Whether heat is used: `OffloadParams.heat`, unless the environment says no."""
    return params_heat and os.environ.get("HOBBIT_HEAT", "1") not in ("", "0")


class HeatFile:
    """The heat of one model.

    Args:
        fingerprint: of its experts: "sha256:" and hexadecimal digits.
        n_layer, n_expert: MoE layers, and experts of a layer.
    """

    def __init__(self, fingerprint: str, n_layer: int, n_expert: int) -> None:
        self.path = cache_folder() / "heat" / f"{fingerprint.rpartition(':')[2]}.bin"
        self._head = _HEAD.pack(b"HOBHEAT", _VERSION, n_layer, n_expert)
        self._size = n_layer * n_expert * 8
        self._saved = time.monotonic()
        self.used = False

    def load(self) -> Optional[bytes]:
        """The array of floats; None: there is none, or none that is right."""
        with contextlib.suppress(OSError):
            with open(self.path, "rb") as file:
                data = file.read(len(self._head) + self._size + 5)
            body, crc = data[:-4], data[-4:]
            if data.startswith(self._head) and len(body) == len(self._head) + self._size:
                return body[len(self._head) :] if crc == _crc(body) else None
        return None

    def save(self, floats: bytes) -> None:
        """Writes the array; it appears whole or not at all."""
        self._saved = time.monotonic()
        if len(floats) != self._size:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            body = self._head + floats
            with replacing(self.path) as partial:
                partial.write_bytes(body + _crc(body))
            for old in sorted(self.path.parent.glob("*.bin"), key=lambda p: p.stat().st_mtime)[:-MAX_FILES]:
                old.unlink()

    def decoded(self, floats: Callable[[], bytes]) -> None:
        """There is something new; `save`, when the last time is some minutes ago."""
        self.used = True
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save(floats())


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))
