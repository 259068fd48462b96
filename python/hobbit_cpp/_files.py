"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Iterator, Union

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Union[str, os.PathLike[str]]) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the block: an empty file beside it, gone again if the block raises.

    A symbolic link is followed: what it names is replaced, with the permissions it had.

    Raises:
        OSError: nothing can be made there; what was there before still is.
    """
    target = Path(os.path.realpath(path))
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        os.fchmod(fd, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.close(fd)
        yield Path(name)
        os.replace(name, target)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(e, OSError) and e.filename in (None, name) and e.errno is not None:
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from e  # a full disk says not what was written
        raise


def _umask() -> int:
    """Read, not set and set back: other threads may make files meanwhile."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
