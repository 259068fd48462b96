"""Collects an importance matrix: what `hobbit imatrix` does.

For each column of an expert tensor the sum of the squares of the inputs that each of its experts was given by the router, and how
many those were. Quantisers weight the error of a weight by the mean square of what it is multiplied by. The file is that of
llama.cpp's llama-imatrix: `hobbit convert --imatrix` and llama-quantize read it. Only routed experts are in it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._memory import Size
from .convert.header import TensorInfo, pad, string_value, strings_value, u32_value, write_header
from .convert.imatrix import imatrix_path
from .errors import HobbitError, ParameterError
from .llama import Llama
from .params import OffloadParams
from .trace.record import decode_sequence, load_for_text, sequences_of

__all__ = ["ImatrixReport", "imatrix_path", "record_imatrix"]

# (tokens done, tokens in all)
Progress = Callable[[int, int], None]

_ALIGNMENT = 32
_F32 = 0


@dataclass(frozen=True)
class ImatrixReport:
    """What was collected.

    Attributes:
        path: the file; n_tensors: expert tensors in it; n_tokens: of the text.
        n_experts: experts over all layers; n_unused: of these without data, since the text never led to them.
        fewest: tokens of the expert with the fewest, of those that have any.
    """

    path: Path
    n_tensors: int
    n_tokens: int
    n_experts: int
    n_unused: int
    fewest: int


class _Collecting(Llama):
    """The memory that llama_cpp keeps for the logits of a whole context is not used here, the sums are."""

    def _memory_to_come(self) -> int:
        return self.n_vocab() * 4 * (16 + self.n_batch) + self._offloaded().inputs_bytes()


def record_imatrix(
    model: Union[str, os.PathLike[str]],
    text: str,
    out: Optional[Union[str, os.PathLike[str]]] = None,
    *,
    n_tokens: Optional[int] = None,
    context: int = 512,
    batch: int = 512,
    memory: Optional[Size] = None,
    expert_cache: Optional[Size] = None,
    threads: Optional[int] = None,
    dataset: str = "",
    progress: Optional[Progress] = None,
) -> ImatrixReport:
    """Runs `model` over `text` in exact mode and writes the importance matrix of its experts.

    Args:
        out: the new file, which appears whole; default: `model.imatrix.gguf` beside `model.gguf`, where `convert` finds it.
        n_tokens: stop after so many; None: the whole text.
        context: tokens of a sequence; each begins with the model's BOS token, if it has one.
        batch: tokens a llama_decode. Each expert is read once for it; the logits of all of them are in memory.
        memory, expert_cache, threads: as for `hobbit_cpp.Llama`. The sums take 4 bytes for each expert and column.
        dataset: the name of the text, for the file.
        progress: called with (tokens done, tokens in all).

    Raises:
        ParameterError: there is no text, or no token of it is wanted.
        HobbitError: the model gives numbers that are not finite; and what `hobbit_cpp.Llama` raises.
    """
    if batch < 1:
        raise ParameterError(f"a batch of {batch} tokens is none")
    llm = load_for_text(
        model,
        _Collecting,
        OffloadParams(exact=True, low_model=False, heat=False),
        n_tokens=n_tokens,
        context=context,
        batch=batch,
        memory=memory,
        expert_cache=expert_cache,
        threads=threads,
    )
    batch = llm.n_batch
    try:
        sequences = sequences_of(llm, text, context, False, n_tokens)
        total = sum(map(len, sequences))
        if total == 0:
            raise ParameterError("the text is empty")
        session = llm._offloaded()
        session.collect_inputs(True)
        done = 0
        for tokens in sequences:
            for n in decode_sequence(llm, tokens, batch):
                done += n
                if progress is not None:
                    progress(done, total)
        entries = {name: (sums, counts) for name, sums, counts in session.inputs()}
        for name, (sums, _) in entries.items():
            if not np.isfinite(sums).all():
                raise HobbitError(f"{model}: inputs of {name} are not finite: the model is damaged, or its activations overflow")
        path = imatrix_path(Path(model)) if out is None else Path(out)
        _write(path, entries, dataset, total, context)
        counts = np.concatenate([counts for name, (_, counts) in entries.items() if "_down_" in name])
        used = counts[counts > 0]
        return ImatrixReport(path, len(entries), total, len(counts), len(counts) - len(used), int(used.min()) if len(used) else 0)
    finally:
        llm.close()


def _write(
    path: Path, entries: Dict[str, Tuple[npt.NDArray[Any], npt.NDArray[Any]]], dataset: str, n_tokens: int, context: int
) -> None:
    """As IMatrixCollector::save_imatrix of llama.cpp does it; beside, renamed when it is whole."""
    values = {
        "general.type": string_value("imatrix"),
        "imatrix.datasets": strings_value([dataset] if dataset else []),
        "imatrix.chunk_count": u32_value(max(1, n_tokens // context)),
        "imatrix.chunk_size": u32_value(context),
    }
    arrays: List[Tuple[str, npt.NDArray[Any]]] = []
    for name, (sums, counts) in sorted(entries.items()):
        arrays += [(f"{name}.in_sum2", sums), (f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))]
    infos, offset = [], 0
    for name, array in arrays:
        infos.append(TensorInfo(name, (array.shape[1], array.shape[0]), _F32, offset))
        offset = pad(offset + array.nbytes, _ALIGNMENT)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            _padded(file, write_header(values, infos))
            for _, array in arrays:
                _padded(file, np.ascontiguousarray(array, "<f4").data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _padded(file: BinaryIO, data: Union[bytes, memoryview]) -> None:
    file.write(data)
    file.write(bytes(pad(len(data), _ALIGNMENT) - len(data)))
