"""The file of a trace: a NumPy archive (.npz) of these arrays.

    ids         uint8 or uint16 [tokens, layers, k]   experts selected, for each token and MoE layer
    weights     float16 [tokens, layers, k]           their router weights, as the model gives them: in the order of the ids,
                                                      not always normalised over the selected; where a layer selects
                                                      fewer than k, or one twice, others fill the row with weight 0
    lens        int32 [sequences]                     tokens of each sequence; they sum to `tokens`
    n_experts   int32                                 experts of a layer
    meta        text                                  JSON: model, text, phase, ...

and with predictions (m >= k experts, by falling score; zeros where layer < distance):

    predicted_ids      as ids, [tokens, layers, depth, m]   [t, l, d]: what the router of layer l says to the router input of
                                                            layer l - 1 - d of the same token
    predicted_weights  float16, the same shape              their weights, normalised over the m
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Optional, Union

import numpy as np
import numpy.typing as npt

from .._files import replacing
from ..errors import ParameterError, TraceFormatError

Path = Union[str, "os.PathLike[str]"]
Ids = npt.NDArray[Any]
Weights = npt.NDArray[Any]

_NEEDED = ("ids", "weights", "lens", "n_experts")
_MAX_DEPTH = 4  # HOBBIT_MAX_LOOKAHEAD


@dataclass(frozen=True)
class Trace:
    """Recorded routing. Arrays as in the file (see the module); float32 weights are kept as they are until saved.

    Raises:
        TraceFormatError: shapes that do not fit together, experts that are not there, weights that are not numbers.
    """

    ids: Ids
    weights: Weights
    lens: npt.NDArray[Any]
    n_experts: int
    meta: Dict[str, Any] = field(default_factory=dict)
    predicted_ids: Optional[Ids] = None
    predicted_weights: Optional[Weights] = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def n_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def n_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def k(self) -> int:
        """Experts that a token uses in a layer."""
        return int(self.ids.shape[2])

    @property
    def depth(self) -> int:
        """Layers ahead of which there are predictions; 0: none."""
        return 0 if self.predicted_ids is None else int(self.predicted_ids.shape[2])

    def head(self, n_tokens: int) -> Trace:
        """The first tokens; the last sequence may be cut."""
        return self._cut(0, min(n_tokens, self.n_tokens))

    def tail(self, n_tokens: int) -> Trace:
        """The last tokens; the first sequence may be cut."""
        return self._cut(max(0, self.n_tokens - n_tokens), self.n_tokens)

    def _cut(self, begin: int, end: int) -> Trace:
        if end <= begin:
            raise ParameterError(f"a trace of {end - begin} tokens is none")
        edges = np.clip(np.cumsum(self.lens, dtype=np.int64), begin, end)
        lens = np.diff(edges, prepend=begin)
        part = slice(begin, end)
        guess, guess_weights = self.predicted_ids, self.predicted_weights
        return replace(
            self,
            ids=self.ids[part],
            weights=self.weights[part],
            lens=lens[lens > 0].astype(np.int32),
            predicted_ids=None if guess is None else guess[part],
            predicted_weights=None if guess_weights is None else guess_weights[part],
        )

    def with_predictions(self, recall: float, depth: int = 1, seed: int = 0) -> Trace:
        """With made-up predictions: each selected expert is named with probability `recall`, otherwise a random other one.

        For traces without recorded ones. The same for the same seed. Weights are those of the selection, sorted.
        """
        if not 0 <= recall <= 1:
            raise ParameterError(f"recall is a share, 0 to 1, not {recall}")
        if not 1 <= depth <= _MAX_DEPTH:
            raise ParameterError(f"predictions reach 1 to {_MAX_DEPTH} layers ahead, not {depth}")
        rng = np.random.default_rng(seed)
        order = np.argsort(-self.weights.astype(np.float32), axis=-1, kind="stable")
        ids = np.take_along_axis(self.ids, order, -1)
        weights = np.take_along_axis(self.weights, order, -1).astype(np.float32)
        shape = (self.n_tokens, self.n_layers, depth, self.k)
        guess = np.empty(shape, self.ids.dtype)
        step = 256  # tokens at a time: what follows is n_experts wide
        for begin in range(0, self.n_tokens, step):
            for d in range(depth):
                guess[begin : begin + step, :, d] = _misremember(ids[begin : begin + step], self.n_experts, recall, rng)
        sums = np.maximum(weights.sum(-1, keepdims=True), 1e-9)
        all_weights = np.broadcast_to((weights / sums)[:, :, None], shape)
        for d in range(depth):
            guess[:, : d + 1, d] = 0
        return replace(self, predicted_ids=guess, predicted_weights=all_weights.astype(np.float16))

    def save(self, path: Path) -> None:
        """Writes the file beside and renames it when it is whole."""
        dtype = np.uint8 if self.n_experts <= 256 else np.uint16
        arrays: Dict[str, Any] = {
            "ids": self.ids.astype(dtype),
            "weights": self.weights.astype(np.float16),
            "lens": self.lens.astype(np.int32),
            "n_experts": np.int32(self.n_experts),
            "meta": np.array(json.dumps(self.meta, ensure_ascii=False)),
        }
        if self.predicted_ids is not None and self.predicted_weights is not None:
            arrays["predicted_ids"] = self.predicted_ids.astype(dtype)
            arrays["predicted_weights"] = self.predicted_weights.astype(np.float16)
        with replacing(path) as partial, open(partial, "wb") as f:
            np.savez_compressed(f, **arrays)
            f.flush()
            os.fsync(f.fileno())

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Reads and checks a file.

        Raises:
            TraceFormatError: not a trace, or one that contradicts itself.
            OSError: the file cannot be read.
        """
        name = os.fspath(path)
        try:
            loaded = np.load(name, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise TraceFormatError(f"{name} is a single array, not a trace (.npz)")
            with loaded as archive:
                missing = [key for key in _NEEDED if key not in archive.files]
                if missing:
                    raise TraceFormatError(f"{name} is not a trace: it has no {', '.join(missing)}")
                arrays = {key: archive[key] for key in archive.files}
        except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
            if isinstance(e, TraceFormatError):
                raise
            raise TraceFormatError(f"{name} is not a trace (.npz), or it is damaged") from e
        try:
            meta = json.loads(str(arrays["meta"]), parse_constant=lambda _: None) if "meta" in arrays else {}
        except ValueError as e:
            raise TraceFormatError(f"{name}: its meta is not JSON") from e
        try:
            return cls(
                ids=arrays["ids"],
                weights=arrays["weights"],
                lens=arrays["lens"],
                n_experts=int(arrays["n_experts"]),
                meta=meta if isinstance(meta, dict) else {"meta": meta},
                predicted_ids=arrays.get("predicted_ids"),
                predicted_weights=arrays.get("predicted_weights"),
            )
        except (TypeError, ValueError) as e:
            raise TraceFormatError(f"{name}: {e}") from e


def _misremember(ids: Ids, n_experts: int, recall: float, rng: np.random.Generator) -> Ids:
    """The ids [tokens, layers, k], each replaced by an expert that is not among them with probability 1 - recall."""
    k = ids.shape[-1]
    score = rng.random((*ids.shape[:2], n_experts), dtype=np.float32)
    np.put_along_axis(score, ids.astype(np.int64), -1.0, -1)
    others = np.argsort(score, axis=-1)[..., k:][..., :k]  # in random order
    right = rng.random(ids.shape, dtype=np.float32) < recall
    missing = k - others.shape[-1]  # too few others to be wrong with
    if missing > 0:
        right[..., k - missing :] = True
        others = np.pad(others, [(0, 0), (0, 0), (0, missing)])
    out: Ids = np.where(right, ids, others).astype(ids.dtype)
    return out


def _check(t: Trace) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise TraceFormatError(what)

    need(t.ids.ndim == 3 and t.ids.dtype.kind in "ui", "ids are whole numbers [tokens, layers, k]")
    need(min(t.ids.shape) > 0, f"the trace is empty: ids have the shape {list(t.ids.shape)}")
    need(t.weights.shape == t.ids.shape and t.weights.dtype.kind == "f", "weights are numbers of the shape of the ids")
    need(bool(np.isfinite(t.weights).all()), "a weight is not a number")
    need(t.k <= t.n_experts <= 65535, f"k = {t.k} of n_experts = {t.n_experts} experts cannot be")
    need(int(t.ids.min()) >= 0 and int(t.ids.max()) < t.n_experts, f"an id is not below n_experts = {t.n_experts}")
    ordered = np.sort(t.ids, axis=-1)
    need(not bool((ordered[..., 1:] == ordered[..., :-1]).any()), "an expert is selected twice for one token and layer")
    need(t.lens.ndim == 1 and t.lens.dtype.kind in "ui" and int(t.lens.min(initial=1)) > 0, "lens are positive whole numbers")
    total = sum(map(int, t.lens))  # which does not wrap around
    need(total == t.n_tokens, f"lens sum to {total}, but there are {t.n_tokens} tokens")
    need((t.predicted_ids is None) == (t.predicted_weights is None), "predicted_ids and predicted_weights go together")
    if t.predicted_ids is not None and t.predicted_weights is not None:
        guess, weights = t.predicted_ids, t.predicted_weights
        need(guess.ndim == 4 and guess.shape[:2] == t.ids.shape[:2] and guess.dtype.kind in "ui",
             "predicted_ids are whole numbers [tokens, layers, depth, m]")  # fmt: skip
        need(1 <= guess.shape[2] <= _MAX_DEPTH, f"predictions reach 1 to {_MAX_DEPTH} layers ahead")
        need(t.k <= guess.shape[3] <= t.n_experts, "a prediction names k experts or more")
        need(int(guess.min()) >= 0 and int(guess.max()) < t.n_experts, "a predicted id is not below n_experts")
        need(weights.shape == guess.shape and weights.dtype.kind == "f" and bool(np.isfinite(weights).all()),
             "predicted_weights are numbers of the shape of predicted_ids")  # fmt: skip
