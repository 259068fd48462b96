"""Runs a model over a text and records what its routers select."""

from __future__ import annotations

import os
from typing import Any, Callable, List, Optional, Sequence, Union

import numpy as np

from .._memory import Size
from .._texts import beginning_of, first_tokens
from ..errors import ParameterError
from ..params import OffloadParams
from .format import Trace

# (tokens done, tokens in all)
Progress = Callable[[int, int], None]


def documents_of(text: str) -> List[str]:
    """The parts of a text between blank lines; empty ones are left out."""
    parts: List[List[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return ["\n".join(p) for p in parts if p]


def sequences_of(llm: Any, text: str, context: int, documents: bool, n_tokens: Optional[int]) -> List[List[int]]:
    """Token ids of each sequence, none longer than the context, together at most n_tokens."""
    bos = llm.token_bos()
    add_bos = bool(llm._model.add_bos_token()) and bos >= 0
    room = context - add_bos

    def tokenize(part: str) -> Sequence[int]:
        tokens: Sequence[int] = llm.tokenize(part.encode("utf-8"), add_bos=False, special=False)
        return tokens

    pieces: List[List[int]] = []
    left = n_tokens
    for part in documents_of(text) if documents else [text]:
        tokens = tokenize(part) if left is None else first_tokens(tokenize, beginning_of(part), left)
        for i in range(0, len(tokens), room):
            piece = ([bos] if add_bos else []) + list(tokens[i : i + room])
            piece = piece if left is None else piece[:left]
            if not piece:
                return pieces
            pieces.append(piece)
            left = None if left is None else left - len(piece)
            if documents:
                break  # what does not fit into the context is cut off: the next sequence is another document
    return pieces


def record(
    model: Union[str, os.PathLike[str]],
    text: str,
    *,
    n_tokens: Optional[int] = None,
    context: int = 512,
    documents: bool = False,
    predictions: int = 0,
    memory: Optional[Size] = None,
    expert_cache: Optional[Size] = None,
    threads: Optional[int] = None,
    meta: Optional[dict[str, Any]] = None,
    progress: Optional[Progress] = None,
) -> Trace:
    """The routing of `model` over `text`, teacher-forced: every token is given, none generated.

    In exact mode, so that the routing is the model's own.

    Args:
        n_tokens: stop after so many; None: the whole text.
        context: tokens of a sequence.
        documents: sequences are the parts of the text between blank lines, cut at `context`, instead of pieces of
            `context` tokens. Either begins with the model's BOS token, if it has one; that is part of the trace.
        predictions: layers ahead whose predictions are recorded too, 0 to 4.
        memory, expert_cache, threads: as for `hobbit_cpp.Llama`.
        meta: more to be written into the trace's meta.
        progress: called with (tokens done, tokens in all).

    Returns:
        A trace with float32 weights.
    """
    from .._text_model import decode_sequence, load_for_text

    llm = load_for_text(
        model,
        OffloadParams(exact=True, low_model=False, prefetch_depth=0, heat=False),
        n_tokens=n_tokens,
        context=context,
        batch=128,  # llama.cpp keeps the logits of all of them
        memory=memory,
        expert_cache=expert_cache,
        threads=threads,
    )
    batch = llm.n_batch
    try:
        session = llm._offloaded()
        sequences = sequences_of(llm, text, context, documents, n_tokens)
        total = sum(map(len, sequences))
        if total == 0:
            raise ParameterError("the text is empty")
        parts = []
        done = 0
        for tokens in sequences:
            session.trace(True, predictions)
            for n in decode_sequence(llm, tokens, batch):
                done += n
                if progress is not None:
                    progress(done, total)
            parts.append((*session.trace_read(), *session.trace_read_predictions(predictions)))
        session.trace(False)
        info = llm.offload_info
        described = {
            "model": os.path.basename(os.fspath(model)),
            "name": str(llm.metadata.get("general.name", "")),
            "architecture": str(llm.metadata.get("general.architecture", "")),
            "phase": "teacher-forced",
            "sequences": "documents" if documents else f"{context} tokens",
            **(meta or {}),
        }
    finally:
        llm.close()
    ids, weights, guess, guess_weights = (np.concatenate(column) for column in zip(*parts))
    dtype = np.uint8 if info.n_expert <= 256 else np.uint16
    return Trace(
        ids=ids.astype(dtype),
        weights=weights,
        lens=np.array([len(tokens) for tokens in sequences], np.int32),
        n_experts=info.n_expert,
        meta=described,
        predicted_ids=guess.astype(dtype) if predictions else None,
        predicted_weights=guess_weights if predictions else None,
    )
