"""What a GGUF holds and which memory budgets make sense for it, without reading weights: `hobbit inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence, Union

import numpy as np

from ._handle import ModelInfo
from ._session import Session
from ._sidecar import ARCHITECTURE, LowModel, low_path
from .calibrate.store import calibration_path, load_for
from .convert.ggtypes import load_types
from .convert.header import Header, pad
from .convert.plan import LOW_PREFIX, Tensor, is_expert
from .convert.source import Source
from .errors import HobbitError, NotMoeError
from .params import OffloadParams

if TYPE_CHECKING:
    from .bench.sizes import Sizes

__all__ = ["BUDGET_CONTEXT", "inspect_file"]

BUDGET_CONTEXT = 4096
"""Tokens of context that the budgets have room for, where the model takes as many."""
_BATCH = 512
# By which two processes with the same model differ; budgets are whole MiB.
_MARGIN = 8 << 20


def inspect_file(path: Union[str, os.PathLike[str]], low_model: LowModel = None) -> Dict[str, Any]:
    """Describes a model: plain values, ready for JSON. Sizes are bytes. Keys are only ever added.

    Args:
        path: a GGUF; of a split one any part.
        low_model: its sidecar, see `OffloadParams`.

    Returns:
        format: 1.
        kind: "model", or "sidecar" (only low-precision copies).
        files: all parts. bytes: their size.
        name, architecture: of the metadata. layers: blocks, dense ones too. context_length: most tokens, or None.
        moe: whether there are routed experts; without them the keys from `moe_layers` to `bytes_cycle_low` are 0.
        moe_layers: blocks with routed experts. experts: most in a layer. experts_used: by a token (top-k).
        shared_experts: always used, counted as dense.
        bytes_dense: all that is not a routed expert. bytes_high, bytes_low: all routed experts in either precision.
        bytes_expert_high, bytes_expert_low: the largest expert (gate, up and down).
        bytes_cycle_high, bytes_cycle_low: the experts of one token: top-k of every layer.
        types: for "dense", "high" and "low" a list of {type, tensors, bytes, share}, largest first.
        low: where the low-precision copies are: "none", "file" or "sidecar".
        sidecar: None, or {path, belongs, reason}: a sidecar that does not belong to the model says why not.
        calibration: None, or {path, belongs, reason, qualities}: the calibration beside the model (`hobbit calibrate`);
            `qualities`: for "0.5%" and so on the shares `high`, `low`, `skipped` of all selections, `bytes` asked by those of
            exact mode, t1, t2.
        offload: {possible, reason}: whether offload="hobbit" takes the model, and if not, why.
        direct_io: None, or {alignment, slices, slices_aligned, read_beyond}: `alignment` of direct reads where the file lies (1:
            buffered), expert slices in all, those that begin and end at a multiple of it, and what is read beyond the
            slices as a share of their bytes.
        kv_bytes_per_1k_tokens: KV cache in F16 for 1024 of the n_ctx tokens below, as llama.cpp says; None when it cannot load
            the model, or offload is not possible.
        budgets: None as well, or what `memory=` may be: {n_ctx, smallest, one_cycle, experts_25_percent, experts_50_percent,
            experts_100_percent}, for a context of n_ctx tokens and batches of up to 512 (128 at the smallest): the smallest that
            works, one that holds as many experts as a token uses, and shares of all experts.

    Raises:
        ConvertError, ModelFileError: not a readable GGUF.
    """
    types = load_types()
    with Source(Path(path), types, header_only=True) as source:
        header = source.header
        is_sidecar = header.string("general.architecture") == ARCHITECTURE
        experts = [t for t in source.tensors if is_expert(t.name, t.shape)]
        high = [t for t in experts if not t.name.startswith(LOW_PREFIX)]
        low = [t for t in experts if t.name.startswith(LOW_PREFIX)]
        routed = {t.name for t in experts}
        dense = [t for t in source.tensors if t.name not in routed]
        out = _header_facts(source, header)
        out["kind"] = "sidecar" if is_sidecar else "model"
        first = str(source.paths[0])

    info: Optional[ModelInfo] = None
    reason: Optional[str] = None
    out["sidecar"] = None
    where = "file" if low else "none"
    if is_sidecar:
        reason = "a sidecar is used beside its model"
    else:
        beside = low_path(first, low_model)
        if beside is not None:
            out["sidecar"], info = _with_sidecar(first, beside)
            if info is not None:
                where = "sidecar"
                with Source(beside, types) as other:
                    low = [t for t in other.tensors if t.name.startswith(LOW_PREFIX)]
        if info is None:
            info, reason = _offload_info(first, False)
    out["low"] = where
    out["calibration"] = None if is_sidecar else _calibration(first, low_model)
    out["offload"] = {"possible": info is not None, "reason": reason}
    out.update(_sizes(dense, high, low, info, header))
    out["types"] = {"dense": _types(dense), "high": _types(high), "low": _types(low)}
    out["direct_io"] = None if info is None else _alignment([*high, *low], info.io_alignment if info.direct_io else 1)
    n_ctx = min(BUDGET_CONTEXT, out["context_length"] or BUDGET_CONTEXT)
    sizes = None if info is None else _measured(first, out["sidecar"]["path"] if where == "sidecar" else False, n_ctx)
    out["kv_bytes_per_1k_tokens"] = None if sizes is None else sizes.kv * 1024 // sizes.n_ctx
    out["budgets"] = None if sizes is None else _budgets(sizes)
    return out


def _header_facts(source: Source, header: Header) -> Dict[str, Any]:
    arch = header.string("general.architecture")
    return {
        "format": 1,
        "kind": "",
        "files": [str(p) for p in source.paths],
        "bytes": source.size,
        "name": header.string("general.name"),
        "architecture": arch,
        "layers": header.integer(f"{arch}.block_count"),
        "context_length": header.integer(f"{arch}.context_length") or None,
    }


def _offload_info(path: str, low_model: LowModel) -> tuple[Optional[ModelInfo], Optional[str]]:
    try:
        session = Session(path, OffloadParams(low_model=low_model))
    except NotMoeError:
        return None, "a dense model: there are no routed experts to offload"
    except HobbitError as e:
        return None, str(e)
    info = session.info
    session.close()
    return info, None


def _with_sidecar(path: str, beside: Path) -> tuple[Dict[str, Any], Optional[ModelInfo]]:
    info, reason = _offload_info(path, beside)
    return {"path": str(beside), "belongs": info is not None, "reason": reason}, info


def _calibration(path: str, low_model: LowModel) -> Optional[Dict[str, Any]]:
    name = str(calibration_path(path))
    try:
        found = load_for(path, OffloadParams(low_model=low_model))
    except HobbitError as e:
        return {"path": name, "belongs": False, "reason": str(e), "qualities": {}}
    return None if found is None else {"path": name, "belongs": True, "reason": None, "qualities": found.curve.plain()}


def _sizes(
    dense: Sequence[Tensor], high: Sequence[Tensor], low: Sequence[Tensor], info: Optional[ModelInfo], header: Header
) -> Dict[str, Any]:
    arch = header.string("general.architecture")
    used = header.integers(f"{arch}.expert_used_count") or [0]  # one number, or one for each block
    layers = {t.name.split(".")[1]: t for t in high if t.name.startswith("blk.")}
    shared = any("_shexp." in t.name for t in dense)
    moe = bool(high)
    return {
        "moe": moe,
        "moe_layers": info.n_moe_layer if info is not None else len(layers),
        "experts": max((t.shape[2] for t in high), default=0),
        "experts_used": max(used) if moe else 0,
        "shared_experts": max(header.integer(f"{arch}.expert_shared_count"), int(shared)) if moe else 0,
        "bytes_dense": _bytes(dense),
        "bytes_high": _bytes(high),
        "bytes_low": _bytes(low),
        "bytes_expert_high": max(_expert_bytes(high).values(), default=0),
        "bytes_expert_low": max(_expert_bytes(low).values(), default=0),
        "bytes_cycle_high": _cycle_bytes(high, used),
        "bytes_cycle_low": _cycle_bytes(low, used),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.n_bytes for t in tensors)


def _expert_bytes(tensors: Iterable[Tensor]) -> Dict[str, int]:
    """Bytes of one expert by layer: two sets of experts in a block are two layers."""
    out: Dict[str, int] = {}
    for t in tensors:
        name = t.name[len(LOW_PREFIX) :] if t.name.startswith(LOW_PREFIX) else t.name
        layer = ".".join(name.split(".")[:2]) + ("ch" if "_chexps" in name else "")
        out[layer] = out.get(layer, 0) + t.n_bytes // t.shape[2]
    return out


def _cycle_bytes(tensors: Iterable[Tensor], used: Sequence[int]) -> int:
    """Bytes of the experts of one token."""

    def of(layer: str) -> int:
        block = layer.removeprefix("blk.").removesuffix("ch")
        return used[int(block)] if len(used) > 1 and block.isdecimal() and int(block) < len(used) else used[0]

    return sum(of(layer) * n_bytes for layer, n_bytes in _expert_bytes(tensors).items())


def _types(tensors: Sequence[Tensor]) -> List[Dict[str, Any]]:
    total = _bytes(tensors)
    kinds = {t.type.name for t in tensors}
    rows = []
    for kind in kinds:
        own = [t for t in tensors if t.type.name == kind]
        rows.append({"type": kind, "tensors": len(own), "bytes": _bytes(own), "share": _bytes(own) / total if total else 0.0})
    return sorted(rows, key=lambda row: (-int(str(row["bytes"])), str(row["type"])))


def _alignment(tensors: Sequence[Tensor], alignment: int) -> Dict[str, Any]:
    n = aligned = beyond = total = 0
    for t in tensors:
        size = t.n_bytes // t.shape[2]
        begin = t.offset + size * np.arange(t.shape[2], dtype=np.int64)
        end = begin + size
        span = -(-end // alignment) * alignment - begin // alignment * alignment
        n += t.shape[2]
        aligned += int(((begin % alignment == 0) & (end % alignment == 0)).sum())
        beyond += int((span - size).sum())
        total += t.n_bytes
    return {
        "alignment": alignment,
        "slices": n,
        "slices_aligned": aligned,
        "read_beyond": beyond / total if total else 0.0,
    }


def _measured(path: str, low_model: LowModel, n_ctx: int) -> Optional[Sizes]:
    """What llama.cpp says it will hold with a context of n_ctx tokens; None when it cannot load the model."""
    from ._memory import cores
    from .bench.sizes import measure_sizes

    try:
        return measure_sizes(Path(path), n_ctx, _BATCH, _BATCH, cores(), low_model)
    except (HobbitError, ValueError, RuntimeError):
        return None


def _budgets(sizes: Sizes) -> Dict[str, Any]:
    info = sizes.info

    def with_pool(pool: int) -> int:
        return pad(max(sizes.budget(max(info.pool_min + sizes.prompt, pool)) + _MARGIN, sizes.smallest), 1 << 20)

    def with_slots(n: float) -> int:
        return with_pool(sizes.streaming + int(n * info.slot_high))

    return {
        "n_ctx": sizes.n_ctx,
        "smallest": with_pool(info.pool_min),
        "one_cycle": with_slots(info.n_moe_layer * info.n_expert_used),
        "experts_25_percent": with_slots(sizes.n_experts * 0.25),
        "experts_50_percent": with_slots(sizes.n_experts * 0.5),
        "experts_100_percent": with_pool(info.pool_max + sizes.longest),
    }
