"""What a user may ask for with `quality=`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Optional, Union

from ..errors import ParameterError

# What says where a calibration is: a path, None: beside the model if there, False or "none": nowhere.
CalibrationFile = Union[str, "os.PathLike[str]", bool, None]


@dataclass(frozen=True)
class Quality:
    """One of: `exact`, `paper`, a change of perplexity (0.01: 1 %), bytes a token."""

    exact: bool = False
    paper: bool = False
    change: Optional[float] = None
    bytes_per_token: Optional[float] = None


def parse_quality(text: str) -> Quality:
    """ "exact", "paper", "1%", "40 MB/token".

    Raises:
        ParameterError: none of these.
    """
    plain = text.strip().lower() if isinstance(text, str) else ""
    if plain in ("exact", "paper"):
        return Quality(exact=plain == "exact", paper=plain == "paper")
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|mb\s*/\s*tok(?:en)?)", plain)
    number = float(found[1]) if found else 0.0
    if found and found[2] == "%" and number <= 1000:
        return Quality(change=number / 100)
    if found and found[2] != "%" and 0 < number < 1e9:
        return Quality(bytes_per_token=number * 1e6)
    raise ParameterError(f"quality {text!r} is not 'exact', 'paper', a change of perplexity like '1%', or like '40MB/token'")
