"""`Llama`: llama-cpp-python's class, and the offload of routed experts."""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import os
import threading
import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Dict, Generator, Iterator, List, Optional, Sequence, Union

import numpy as np

from . import _lib, _memory
from ._arguments import check_depth, check_with_offload, check_without_offload
from ._batches import LEAST
from ._calls import Calls
from ._fields import UpstreamFields
from ._log import errors_explained, stoppable
from ._logprobs import in_pieces
from ._memory import Size
from ._offloaded import OffloadMethods
from ._session import Session
from ._sidecar import LowModel
from ._signatures import own_arguments, sign_as
from .calibrate import dial
from .calibrate.quality import CalibrationFile
from .errors import EvaluationCancelled, HobbitWarning, MemoryBudgetError, NotMoeError, StateError
from .params import OffloadParams

llama_cpp: Any = _lib.load_bindings()
_c: Any = llama_cpp.llama_cpp

if TYPE_CHECKING:
    from llama_cpp import Llama as _Llama
else:
    _Llama = llama_cpp.Llama


# Upstream calls it by the name of its class.
_Llama.logits_to_logprobs = staticmethod(in_pieces(_Llama.logits_to_logprobs))  # type: ignore[method-assign]


# With offload, and not closed yet.
_open_models: weakref.WeakSet[Llama] = weakref.WeakSet()


@atexit.register
def _close_models() -> None:
    """At exit, while threads still run: a decode of a daemon thread would go on in libraries that are being taken down."""
    hook = threading.excepthook
    # Its call ends as cancelled, which is nobody's concern any more.
    threading.excepthook = lambda args: None if args.exc_type is EvaluationCancelled else hook(args)
    for model in list(_open_models):
        model.close()


class Llama(OffloadMethods, UpstreamFields, _Llama):
    """A llama.cpp model whose routed experts may stay on disk.

    Everything that `llama_cpp.Llama` has, unchanged, and these arguments:

    Args:
        model_path: a GGUF; of a split one the first part.
        offload: "hobbit" (HOBBIT, arXiv 2411.01433: mixed precision on a miss, layer-ahead prefetch; the cache is ours), "fate"
            (Fate, arXiv 2502.12224), "lru" (load on demand), `OffloadParams`, or None: stock llama.cpp, nothing of the engine.
        memory: what the whole process may take: "4GiB", "50%" of the memory there is, or bytes. Covers dense weights, KV
            cache, compute buffers and the expert pool. Default: most of what is free, seen through cgroup limits.
        expert_cache: size of the expert pool alone.
        exact: only high precision: the logits of stock llama.cpp, bit for bit.
        precision_rule: "miss" (the paper's), "weight" (reproducible) or "drop" (no low precision); see `OffloadParams`.
        low_model, calibration: files with low-precision copies (`hobbit convert --sidecar`) and of `hobbit calibrate`; None:
            `model.low.gguf` and `model.calibration.json` beside `model.gguf` if they are there; False or "none": none.
        quality: how much may be lost: "exact", "1%" (perplexity above that of exact mode, at most, by the model's calibration:
            `hobbit calibrate`), "40MB/token" (read, on average), or "paper"; see `OffloadParams`, also for the default.
        progress: called while the weights that stay in memory are read, with the share of them that is there, 0 to 1. What
            it returns says whether to go on; False ends the loading with an exception. Must not raise.

    Raises:
        ModelFormatError, UnsupportedModelError: the file cannot be offloaded, with the reason.
        MemoryBudgetError: the budget is too small, with the smallest that works.

    A dense model runs as with offload=None, with a `HobbitWarning`: it has nothing to offload, and `memory` does not limit it.

    Example:
        >>> llm = Llama("qwen3-30b-a3b-q4_k_m.gguf", offload="hobbit", memory="6GiB", n_ctx=4096)
        >>> llm.create_chat_completion([{"role": "user", "content": "Hello"}])
        >>> llm.offload_stats().hit_rate
    """

    def __init__(
        self,
        model_path: Union[str, os.PathLike[str]],
        *,
        offload: Union[str, OffloadParams, None] = None,
        memory: Optional[Size] = None,
        expert_cache: Optional[Size] = None,
        exact: Optional[bool] = None,
        precision_rule: Optional[str] = None,
        low_model: LowModel = None,
        quality: Optional[str] = None,
        calibration: CalibrationFile = None,
        progress: Optional[Callable[[float], bool]] = None,
        **kwargs: Any,
    ) -> None:
        self._begin(progress)
        path = os.fspath(model_path)
        ours: Dict[str, Any] = {"exact": exact, "precision_rule": precision_rule, "expert_cache": expert_cache}
        ours.update(low_model=low_model, quality=quality, calibration=calibration)
        if offload is None:
            check_without_offload(memory=memory, **ours)
            with errors_explained(path):
                super().__init__(path, **kwargs)
            self._fit_arrays()
            return

        params = OffloadParams.of(offload, **ours)
        check_with_offload(path, kwargs, _ARGUMENTS, _Llama.__init__)
        if kwargs.get("embedding"):
            # Pooling needs the whole batch at once: llama.cpp aborts otherwise.
            kwargs["n_ubatch"] = max(kwargs.get("n_ubatch", 512), kwargs.get("n_batch", 512))
        try:
            params, calibrated = dial.resolve(path, params)
            session = Session(path, params)
        except NotMoeError:
            limit = "" if memory is None and params.expert_cache is None else "; no memory limit is applied"
            warnings.warn(
                f"{path} has no routed experts: there is nothing to offload, and it runs as with offload=None{limit}",
                HobbitWarning,
                stacklevel=2,
            )
            with errors_explained(path):
                super().__init__(path, **kwargs)
            self._fit_arrays()
            return
        self._session = session
        _open_models.add(self)
        try:
            try:
                self._load(path, session, memory, kwargs)
            except MemoryBudgetError:
                if not session.embeddings_may_leave:
                    raise
                # KV cache and buffers, whose sizes are known only now, need the place that embeddings were given.
                super().close()
                session.close()
                self._session = session = Session(path, replace(params, embeddings_on_disk=True))
                self._load(path, session, memory, kwargs)
            if calibrated is not None and params.quality is not None:
                session.feedback = dial.begin(session, calibrated, params)
        except BaseException:
            self.close()
            raise

    def _load(self, path: str, session: Session, memory: Optional[Size], kwargs: Dict[str, Any]) -> None:
        """The model as upstream loads it, and the expert pool out of what the budget leaves."""
        if not session.plan(memory):
            # Loaded without its weights, so that the error can say what is enough.
            self._no_alloc = True
            with errors_explained(path):
                super().__init__(path, **{**kwargs, "lora_path": None})
            session.n_outputs = self._n_outputs()
            raise session.refuse_unloaded(self._context_address(), self._memory_to_come(), self._least_batch())
        with session.bound(), errors_explained(path):
            super().__init__(path, **kwargs)
        self._fit_arrays()
        session.n_outputs = self._n_outputs()
        session.start(
            self._context_address(),
            self._memory_to_come(),
            self._n_ubatch(),
            self._least_batch(),
            self._lends(),
        )

    def _begin(self, progress: Optional[Callable[[float], bool]] = None) -> None:
        """What everything else relies on."""
        self._session = None
        self._calls = Calls(self._stop_decoding, self._clear_stop)
        self._no_alloc = False
        self._n_logits = 0  # tokens at the end of the context whose logits llama.cpp has, unless `_requires_eval`
        self._sampling = 0  # calls of `sample`, of which a logits processor may begin another
        self._retired: List[Any] = []  # samplers that are to be freed when these have ended
        self._progress = _c.llama_progress_callback(stoppable(progress))  # kept as long as llama.cpp may call it

    def _context_address(self) -> int:
        return ctypes.cast(self._ctx.ctx, ctypes.c_void_p).value or 0

    def _memory_to_come(self) -> int:
        """Bytes that this object will touch beside the ggml buffers: logits, candidates, the work buffer of a graph."""
        n_vocab, n_batch = self.n_vocab(), self.n_batch
        rows = 0
        if self._logits_all:
            # `scores`, their logprobs and a row of these as Python's numbers, llama.cpp's output buffer
            rows = 2 * self.n_ctx() + n_batch + 32
        elif self.context_params.embeddings:
            rows = n_batch  # llama.cpp's output buffer has logits all the same
        return n_vocab * (64 + 4 * rows)

    def _n_outputs(self) -> int:
        """Tokens of a batch whose logits are asked for: mostly the last alone."""
        return int(self.n_batch) if self._logits_all or self.context_params.embeddings else 1

    def _n_ubatch(self) -> int:
        return int(_c.llama_n_ubatch(self._ctx.ctx))

    def _lends(self) -> bool:
        """Whether the pool lends batches what they take: of one that a handler of images decodes by itself it would not know."""
        return self._session is not None and self._session.lends() and self.chat_handler is None

    def _least_batch(self) -> int:
        """Tokens of a batch that the budget has to have room for beside the smallest pool; `eval` cuts where there is no more."""
        # Pooling takes them whole, and who has all logits (trace, imatrix) decodes without `eval`.
        whole = self._logits_all or self.context_params.embeddings or not self._lends()
        return self._n_ubatch() if whole else min(self._n_ubatch(), LEAST)

    # ---- calls: one at a time, and any thread may cancel ----

    def cancel(self) -> None:
        """Stops the call that is running in another thread; it raises `EvaluationCancelled`.

        With offload it stops at the next node of the graph (a part of a layer), also while it waits for the disk; with
        offload=None after the batch at hand. A stream that stands between two chunks raises when it is resumed. Does nothing when
        no call is running, and never touches a call that begins later. Afterwards the object is usable, and keeps the tokens
        whose evaluation was complete (`n_tokens`); a recurrent model starts over.
        """
        self._calls.cancel()

    def _stop_decoding(self) -> None:
        if self._session is not None:
            self._session.cancel()

    def _clear_stop(self) -> None:
        if self._session is not None:
            self._session.clear_cancel()

    @contextlib.contextmanager
    def _decoding(self, n_tokens: int) -> Iterator[None]:
        """Around llama_decode: its failure becomes an exception of ours, and n_tokens and llama.cpp's memory agree afterwards."""
        session = self._session
        try:
            with errors_explained(self.model_path), contextlib.ExitStack() as stack:
                if session is not None:
                    stack.enter_context(session.decoding(n_tokens))
                yield
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """llama.cpp keeps those ubatches of a failed llama_decode that were complete: drops all beyond n_tokens."""
        self._requires_eval = True  # the logits are lost
        memory = _c.llama_get_memory(self._ctx.ctx)
        if memory is None:
            return
        # Of a sliding window (swa_full=False) what the failed batch has pushed out is lost.
        n_swa = int(_c.llama_model_n_swa(self._model.model))
        window_begin = max(0, self.n_tokens - n_swa)
        whole = n_swa == 0 or int(_c.llama_memory_seq_pos_min(memory, 0)) <= window_begin
        if self._is_recurrent or self._is_hybrid or not whole or not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            self._forget()

    def _forget(self) -> None:
        """As before the first token."""
        self.reset()
        memory = _c.llama_get_memory(self._ctx.ctx)
        if memory is not None:
            _c.llama_memory_clear(memory, True)

    def eval(self, tokens: Sequence[int]) -> None:
        with self._calls.running():
            if self._session is not None and self.n_tokens == 0:
                self._session.begin_sequence()
            tokens = list(tokens)
            while True:
                n = min(len(tokens), self.n_batch)
                if self._session is not None:
                    n = self._session.largest_batch(n)
                self._calls.check()
                with self._decoding(n):
                    super().eval(tokens[:n])
                if n > 0:  # the prompt of before needs none
                    self._n_logits = n if self._logits_all else 1
                tokens = tokens[n:]
                if not tokens:
                    return

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.running():
            if not self.context_params.embeddings:
                return super().embed(*args, **kwargs)  # says that embedding=True is needed
            texts: Any = args[0] if args else kwargs.pop("input", None)
            texts = texts if texts is None or isinstance(texts, str) else list(texts)
            given = [texts] if isinstance(texts, str) else texts
            if not given or ("" in given and not self.tokenize(b"")):
                raise ValueError("there is no embedding of an empty text")  # llama_cpp would write before its arrays
            if self._session is not None:
                self._session.begin_sequence()
            context: Any = self._ctx

            def decode(batch: Any) -> None:
                self._calls.check()
                # Clears llama.cpp's memory at its begin, and at its end.
                self.n_tokens = 0
                with self._decoding(batch.n_tokens()):
                    type(context).decode(context, batch)

            context.decode = decode
            try:
                return super().embed(texts, *args[1:], **kwargs)
            finally:
                del context.decode

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Optional[Sequence[int]], None]:
        return self._calls.stream(super().generate(*args, **kwargs))

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        for token in kwargs.get("logit_bias") or ():
            if not 0 <= int(token) < self.n_vocab():  # in the middle of sampling nobody would hear of it
                raise ValueError(f"logit_bias: there is no token {token}: a vocabulary of {self.n_vocab()}")
        return self._calls.stream(super()._create_completion(*args, **kwargs))

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.alone():
            self._check_logits(kwargs.get("idx"))
            self._sampling += 1
            try:
                return super().sample(*args, **kwargs)
            finally:
                self._sampling -= 1
                self._free_samplers()

    def _check_logits(self, idx: Optional[int]) -> None:
        """That there are some of token `idx` (None: the last): llama.cpp would end the process."""
        if self._requires_eval:
            raise StateError("there are no logits to sample from: eval() comes first, also after load_state()")
        if idx is not None and not 1 <= self.n_tokens - idx <= self._n_logits:
            raise ValueError(f"there are no logits of token {idx}: logits_all=True keeps those of a whole batch, else the last's")

    def reset(self) -> None:
        with self._calls.running():
            super().reset()  # type: ignore[no-untyped-call]

    def n_ctx(self) -> int:
        self._calls.check_open()
        return int(super().n_ctx())

    def n_embd(self) -> int:
        self._calls.check_open()
        return int(super().n_embd())

    def n_vocab(self) -> int:
        self._calls.check_open()
        return int(super().n_vocab())

    def tokenize(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.check_open()
        return super().tokenize(*args, **kwargs)

    def detokenize(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        self._calls.check_open()
        # llama.cpp would end the process
        n_vocab = self.n_vocab()
        tokens = list(tokens)
        strange = [t for t in tokens if not 0 <= t < n_vocab]
        if strange:
            raise ValueError(f"there is no token {strange[0]}: a vocabulary of {n_vocab}")
        return super().detokenize(tokens, *args, **kwargs)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        grammar = kwargs.get("grammar")
        if grammar is not None:
            check_depth(grammar._grammar)
            # llama_cpp does not look at what comes of it, and llama.cpp would end the process.
            found = _c.llama_sampler_init_grammar(self._model.vocab, grammar._grammar.encode(), grammar._root.encode())
            if not found:
                raise ValueError("llama.cpp cannot read the grammar (GBNF)")
            _c.llama_sampler_free(found)
        if self._session is not None:
            self._sampler = None  # the one before has its memory still, and nobody needs it
            # llama.cpp writes out every token, and those that each rule leaves: 740 to 1260 bytes for each were measured.
            self._session.lend(0 if grammar is None else 1300 * self.n_vocab())
        return super()._init_sampler(*args, **kwargs)

    def save_state(self) -> Any:
        with self._calls.alone():
            try:
                return super().save_state()
            finally:
                _memory.give_back()  # it copies twice, and what malloc keeps of that would count against the budget

    def load_state(self, state: Any) -> None:
        with self._calls.running():
            rows = min(state.n_tokens, len(self.scores))
            if len(state.scores) != rows:  # of an object with other logits_all or n_batch
                state = copy.copy(state)
                state.scores = np.zeros((rows, self.n_vocab()), np.single)
            try:
                super().load_state(state)
            except BaseException:
                self._forget()  # the tokens of the state are there already, what llama.cpp computed of them is not
                raise
            self._fit_arrays()  # of an object with another n_ctx
            _memory.give_back()

    def __getstate__(self) -> Any:
        if self._session is not None:
            raise TypeError(
                "a model with offload cannot be pickled: its cache and its threads belong to this process. Pass the arguments of "
                "Llama(...) on and load it there"
            )
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Frees the model and the expert pool; safe to call twice.

        A call that runs in another thread is cancelled first. One that this thread is in (a signal handler closes the model) is
        cancelled too, and frees it when it ends.
        """
        calls = self.__dict__.get("_calls")
        if calls is not None:  # else the constructor was never reached
            _open_models.discard(self)
            calls.close(self._free)

    def _free(self) -> None:
        session, gate = self._session, self._calls.gate
        with gate:
            if session is not None:
                session.stop()
        self._sampler = None
        if "_stack" in self.__dict__:
            super().close()
        with gate:
            if session is not None:
                session.close()


_ARGUMENTS = own_arguments(Llama)
sign_as(Llama, _Llama)
