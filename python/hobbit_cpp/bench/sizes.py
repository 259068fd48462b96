"""What a model takes in memory, told by llama.cpp itself without reading any weights; and what a token multiplies by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from hobbit_cpp import _memory
from hobbit_cpp._batches import SMALL
from hobbit_cpp._budget import ROUGHLY, SLACK, SLACK_SHARE, everything_fits
from hobbit_cpp._handle import ModelInfo
from hobbit_cpp._log import errors_explained
from hobbit_cpp._session import Session
from hobbit_cpp._sidecar import LowModel
from hobbit_cpp.calibrate.curve import Curve
from hobbit_cpp.calibrate.store import load_for
from hobbit_cpp.convert.ggtypes import load_types
from hobbit_cpp.convert.plan import LOW_PREFIX, Tensor, is_expert
from hobbit_cpp.convert.source import Source
from hobbit_cpp.errors import CalibrationError
from hobbit_cpp.llama import Llama
from hobbit_cpp.params import OffloadParams

__all__ = ["Product", "Sizes", "Weights", "measure_sizes", "read_weights"]

RANDOM_WEIGHTS_KEY = "hobbit.random_weights"
"""True in a file whose router is noise: its hit rate is its cache share."""
_INPUT_EMBEDDINGS = "token_embd.weight"
_OUTPUT = "output.weight"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model with one context.

    Attributes:
        info: what the file holds.
        process: Python, libraries, the vocabulary.
        dense: weights that are no routed experts, without `embeddings`.
        embeddings: token embeddings that stay on disk where not everything fits.
        kv: the KV cache, and other state of the context.
        buffers: for computing a token.
        prompt: more of them for the batch that there has to be room for, borrowed from the pool; longest: for the largest.
        at_load: what is held while the model is loaded, before there is a pool.
    """

    info: ModelInfo
    n_ctx: int
    process: int
    dense: int
    embeddings: int
    kv: int
    buffers: int
    prompt: int
    longest: int
    at_load: int = 0

    @property
    def held(self) -> int:
        """Everything but the expert pool."""
        return self.process + self.dense + self.kv + self.buffers

    @property
    def streaming(self) -> int:
        """The part of a pool that is no cache."""
        return self.info.pool_min - self.info.n_expert_used * self.info.slot_high

    @property
    def n_experts(self) -> int:
        """Of all layers."""
        return (self.info.pool_max - self.streaming) // self.info.slot_high

    def spare(self, budget: int) -> int:
        """What `memory=budget` leaves beside what a token needs."""
        return budget - self.held - SLACK - int(budget * SLACK_SHARE)

    def pool(self, budget: int) -> int:
        """Of that, what is for experts, but while a prompt is read; below `info.pool_min + prompt` it is refused."""
        return min(self.spare(budget), self.info.pool_max)

    def peak(self, budget: int) -> int:
        """The most that is held of it: by a prompt."""
        info = self.info
        held = self.held
        everything = everything_fits(budget, self.process + info.bytes_dense + info.pool_max)
        if everything and self.spare(budget) >= self.embeddings + info.pool_max:
            held += self.embeddings
        return held + min(self.spare(budget), info.pool_max + self.longest)

    def budget(self, pool: int) -> int:
        """The inverse: the `memory=` that leaves so much."""
        return int((self.held + pool + SLACK) / (1 - SLACK_SHARE)) + 1

    @property
    def smallest(self) -> int:
        """The smallest budget that works, also in a process that holds a little more than this one."""
        least = max(self.info.pool_min + self.prompt, self.at_load - self.held)
        return self.budget(least) + 2 * ROUGHLY

    @property
    def largest(self) -> int:
        """The budget beyond which more does not help: every expert is in memory."""
        return self.budget(self.info.pool_max + self.longest + self.embeddings)


class _Unloaded(Llama):
    """A model without its weights, and a context of it: what there is to know about sizes before anything is loaded."""

    def __init__(self, path: str, params: OffloadParams, kwargs: Dict[str, Any]) -> None:
        self._begin()
        self._session = Session(path, params)
        _memory.give_back()
        self._before = _memory.resident()
        self._no_alloc = True
        super(Llama, self).__init__(path, verbose=False, **kwargs)

    def sizes(self) -> Sizes:
        session = self._session
        assert session is not None
        session.n_outputs = self._n_outputs()
        address = self._context_address()
        ctx = session._ffi.cast("void *", address)
        weights = int(self._model.size())
        kv = max(0, int(session._lib.hobbit_context_resident_bytes(ctx)) - weights)
        token, prompt, longest = (sum(session.fit_batches(address, n)) for n in (SMALL, self._least_batch(), self._n_ubatch()))
        buffers = token + session.info.bytes_tables + self._memory_to_come()
        embeddings = session.bytes_embeddings and session.bytes_embeddings - session.info.bytes_rows_kept
        dense = weights - session.info.bytes_high - embeddings
        held = (_memory.resident(), dense, embeddings, kv, buffers)
        at_load = self._before + dense + session.info.bytes_parsed
        return Sizes(session.info, self.n_ctx(), *held, prompt - token, longest - token, at_load)


def measure_sizes(
    model: Path,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    threads: int,
    low_model: LowModel = None,
    flash_attn: bool = True,
) -> Sizes:
    """Asks llama.cpp. `low_model`: see `OffloadParams`; flash_attn: as `hobbit run` has it.

    Raises:
        NotMoeError, ModelFormatError, UnsupportedModelError: as loading it would.
    """
    kwargs = {
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_threads": threads,
        "n_threads_batch": threads,
        "flash_attn": flash_attn,
    }
    llm: Optional[_Unloaded] = None
    try:
        with errors_explained(str(model)):
            llm = _Unloaded(str(model), OffloadParams(low_model=low_model), kwargs)
            return llm.sizes()
    finally:
        if llm is not None:
            llm.close()


@dataclass(frozen=True)
class Product:
    """Matrices of one type and shape that one token is multiplied by, so many bytes of them in all."""

    type_id: int
    n_in: int
    n_out: int
    bytes: int


@dataclass(frozen=True)
class Weights:
    """What the headers of a model say about its products, and its calibration.

    Attributes:
        dense: for each type, with the shape that most of its bytes have.
        experts: in high precision, of one token.
        random: the weights are noise: no expert is preferred.
        name: of the model.
        curve: of its calibration; None: there is none of use.
    """

    dense: List[Product]
    experts: List[Product]
    n_layer: int
    random: bool
    name: str
    curve: Optional[Curve] = None


def read_weights(model: Path, n_expert_used: int) -> Weights:
    """From the headers of all parts of a model, and the calibration beside it."""
    try:
        found = load_for(str(model), OffloadParams())
    except CalibrationError:  # told when the model is loaded
        found = None
    with Source(model, load_types()) as source:
        tensors = [t for t in source.tensors if not t.name.startswith(LOW_PREFIX)]
        header = source.header
        random = RANDOM_WEIGHTS_KEY in header.values and header.values[RANDOM_WEIGHTS_KEY].scalar() is True
        name = header.string("general.name") or model.name
        n_layer = header.integer(f"{header.string('general.architecture')}.block_count")
    separate_output = any(t.name == _OUTPUT for t in tensors)
    dense: List[Tuple[Tensor, int, int]] = []
    experts: List[Tuple[Tensor, int, int]] = []
    for t in tensors:
        if is_expert(t.name, t.shape):
            k = min(n_expert_used, t.shape[2])
            # the k experts of a token are one operation
            experts.append((t, t.shape[1] * k, t.n_bytes // t.shape[2] * k))
        elif len(t.shape) >= 2 and not (t.name == _INPUT_EMBEDDINGS and separate_output):
            dense.append((t, t.n_rows, t.n_bytes))
    return Weights(_by_type(dense), _by_type(experts), n_layer, random, name, None if found is None else found.curve)


def _by_type(rows: List[Tuple[Tensor, int, int]]) -> List[Product]:
    out = []
    for type_id in sorted({t.type.id for t, _, _ in rows}):
        shapes: Dict[Tuple[int, int], int] = {}
        for t, n_out, n_bytes in rows:
            if t.type.id == type_id:
                shapes[t.row, n_out] = shapes.get((t.row, n_out), 0) + n_bytes
        n_in, n_out = max(shapes, key=lambda shape: shapes[shape])
        out.append(Product(type_id, n_in, n_out, sum(shapes.values())))
    return out
