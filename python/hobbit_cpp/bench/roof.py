"""The roof over a row: how fast it could have been with the bytes it had to read, and where its time went."""

from __future__ import annotations

from typing import Any, Dict, Optional

__all__ = ["add_roof"]

Row = Dict[str, Any]

_ABOVE = 1.05


def add_roof(row: Row, floor_ms: Optional[float], bandwidth: Optional[float]) -> None:
    """Adds to a row of medians what follows from it:

        bound_ms = max(floor_ms, bytes that had to be read / bandwidth)

    bound_share: bound_ms of the time a token took. spent_ms: compute (the floor, as far as the time that was not spent
    waiting goes), stall (waiting for reads), other (what is left: routing, locks, threads that compete with readers).
    prediction_ms, where there is one, is CPU time of the prediction thread beside all that. Of stock llama.cpp it is not
    known what it had to read, nor how long it waits.

    Args:
        floor_ms: a token with every expert in memory.
        bandwidth: of the disk at this model's expert size, bytes a second.
    """
    if "error" in row or not row.get("tok_s"):
        return
    token_ms = 1e3 / row["tok_s"]
    row["token_ms"] = token_ms
    # What stock llama.cpp reads is not what it had to read: the kernel reads ahead, and reads again what it has dropped.
    needed = max(0.0, row["mb_token"] - row.get("mb_wasted_token", 0.0)) if "mb_token" in row else None
    row["needed_mb_token"] = needed
    if floor_ms is not None and bandwidth and needed is not None:
        row["bound_ms"] = max(floor_ms, needed * 1e6 / bandwidth * 1e3)
        row["bound_is"] = "cores" if row["bound_ms"] <= floor_ms else "disk"
        row["bound_share"] = row["bound_ms"] / token_ms
        if row["bound_share"] > _ABOVE:
            row.setdefault("notes", []).append("faster than its bound: disk or cores were busier when they were probed")
    if "stall_ms" in row and floor_ms is not None:
        stall = min(row["stall_ms"], token_ms)
        compute = min(floor_ms, token_ms - stall)
        row["spent_ms"] = {"compute": compute, "stall": stall, "other": token_ms - stall - compute}
