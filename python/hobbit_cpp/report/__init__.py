"""One self-contained page about a run: where experts are used, hit and read, and where the time of a token goes.

`read` takes what `hobbit run --json-stats`, `hobbit trace`, `hobbit bench --json` and `hobbit eval --json` write, `page`
makes HTML of it.
"""

from .page import page
from .sources import Data, read

__all__ = ["Data", "page", "read"]
