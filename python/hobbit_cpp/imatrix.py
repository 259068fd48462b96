"""Collects an importance matrix: what `hobbit imatrix` does.

For each column of an expert tensor the sum of the squares of the inputs that each of its experts was given by the router, and how
many those were. Quantisers weight the error of a weight by the mean square of what it is multiplied by. The file is that of
llama.cpp's llama-imatrix: `hobbit convert --imatrix` and llama-quantize read it. Only routed experts are in it.

Beside it a sample of the inputs themselves, from which `hobbit convert` learns how columns go together (the format:
convert/imatrix.py). It is written as it comes: the inputs of a batch are all that is in memory.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import numpy as np

from ._imatrix_file import ImatrixFile, LayerSample, Sums, new_imatrix
from ._memory import Size
from ._text_model import decode_sequence, load_for_text
from .convert.header import string_value, strings_value, u32_value
from .convert.imatrix import imatrix_path
from .errors import HobbitError, ParameterError
from .params import OffloadParams
from .trace.record import sequences_of

__all__ = ["INPUTS", "ImatrixReport", "imatrix_path", "record_imatrix"]

# (tokens done, tokens in all)
Progress = Callable[[int, int], None]

# Tokens whose inputs are kept: some hundreds for each of 64 experts, of which 4 see a token. Four times as many: 7 % less lost.
INPUTS = 4096


@dataclass(frozen=True)
class ImatrixReport:
    """What was collected.

    Attributes:
        path: the file; n_tensors: expert tensors in it; n_tokens: of the text.
        n_inputs: tokens whose inputs are in it.
        n_experts: experts over all layers; n_unused: of these without data, since the text never led to them.
        fewest: tokens of the expert with the fewest, of those that have any.
    """

    path: Path
    n_tensors: int
    n_tokens: int
    n_inputs: int
    n_experts: int
    n_unused: int
    fewest: int


def record_imatrix(
    model: Union[str, os.PathLike[str]],
    text: str,
    out: Optional[Union[str, os.PathLike[str]]] = None,
    *,
    n_tokens: Optional[int] = None,
    inputs: int = INPUTS,
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
        inputs: tokens whose inputs are kept, spread over the text, of a longer one over three quarters of it; 2 bytes for each,
            layer and column. 0: none.
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
    if inputs < 0:
        raise ParameterError(f"the inputs of {inputs} tokens cannot be kept")
    llm = load_for_text(
        model,
        OffloadParams(exact=True, low_model=False, heat=False),
        input_rows=batch if inputs else 0,
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
        path = imatrix_path(Path(model)) if out is None else Path(out)
        lens = [len(tokens) for tokens in sequences]
        # Of a text that is long enough, the last quarter is left for `hobbit calibrate`: on what low copies are fitted to, they
        # lose less than elsewhere.
        early = lens if total <= inputs else lens[: -(-3 * len(lens) // 4)]
        wanted = spread(early, inputs) + [0] * (len(lens) - len(early))
        values = {
            "general.type": string_value("imatrix"),
            "imatrix.datasets": strings_value([dataset] if dataset else []),
            "imatrix.chunk_count": u32_value(max(1, total // context)),
            "imatrix.chunk_size": u32_value(context),
        }
        session.collect_inputs(True, rows=inputs > 0)
        done = kept = 0
        file: Optional[ImatrixFile] = None
        with contextlib.ExitStack() as stack:
            for tokens, n_wanted in zip(sequences, wanted):
                at = 0
                for n in decode_sequence(llm, tokens, batch):
                    if file is None:  # which layers have inputs that can be kept is known now
                        samples = [LayerSample(i, of, x.shape[1], s.shape[1]) for i, of, x, s in session.input_rows()]
                        file = stack.enter_context(new_imatrix(path, values, _sums(session), samples, sum(wanted)))
                    n_new = max(0, min(n, n_wanted - at))
                    for layer, _, x, selected in session.input_rows() if n_new else ():
                        file.add(layer, kept, x[:n_new], selected[:n_new])
                    kept += n_new
                    at += n
                    done += n
                    if progress is not None:
                        progress(done, total)
            entries = _sums(session)
            for name, (sums, _) in entries.items():
                if not np.isfinite(sums).all():
                    raise HobbitError(
                        f"{model}: inputs of {name} are not finite: the model is damaged, or its activations overflow"
                    )
            assert file is not None
            file.finish(entries)
        counts = np.concatenate([counts for name, (_, counts) in entries.items() if "_down_" in name])
        used = counts[counts > 0]
        fewest = int(used.min()) if len(used) else 0
        return ImatrixReport(path, len(entries), total, kept if samples else 0, len(counts), len(counts) - len(used), fewest)
    finally:
        llm.close()


def spread(lens: Sequence[int], most: int) -> List[int]:
    """How many tokens to take of each of these sequences to get `most`: all of some, evenly spread, and a part of one."""
    taken = [0] * len(lens)
    n = min(len(lens), -(-most * len(lens) // max(1, sum(lens))))
    left = most
    for i in (k * len(lens) // n for k in range(n)):
        taken[i] = min(lens[i], left)
        left -= taken[i]
    return taken


def _sums(session: Any) -> Dict[str, Sums]:
    return {name: (sums, counts) for name, sums, counts in session.inputs()}
