"""A model that is asked for logits only, in batches of a chosen width, and holds no more of them than a batch."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any, List, Optional, Protocol, Sequence

import numpy as np

from .. import _memory
from ..llama import Llama
from ..stats import OffloadStats
from .statistics import Logits

# Tokens a llama_decode where the rule does not depend on the cache.
BATCH_WIDTH = 64


class Scorer(Protocol):
    """What the evaluation needs of a model."""

    @property
    def vocabulary(self) -> int:
        """Words."""

    def words(self, text: str, begin: bool) -> List[int]:
        """Tokens; `begin`: with the token that begins a text, when the model has one."""

    def restart(self) -> None:
        """An empty context: a new sequence. The expert cache keeps its contents."""

    def feed(self, tokens: Sequence[int]) -> Logits:
        """One llama_decode after what is in the context: logits [tokens, vocabulary], valid until the next call."""

    def rewind(self, n: int) -> bool:
        """Back to the first `n` tokens of the context; False when the model's state cannot."""

    def counts(self) -> Optional[OffloadStats]:
        """Since `forget_counts`; None without offload."""

    def forget_counts(self) -> None:
        """All counts to zero."""

    def close(self) -> None:
        """Frees the model."""


class LlamaScorer(Llama):
    """`Llama` as a `Scorer`. `n_batch` is the widest `feed`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores = np.empty((0, 0), np.single)  # n_batch rows of logits that nobody asks for

    @property
    def vocabulary(self) -> int:
        return int(self.n_vocab())

    def _n_outputs(self) -> int:
        return int(self.n_batch)

    def _memory_to_come(self) -> int:
        # llama.cpp's output buffer, and a few rows in double precision while one is scored
        return int(self.n_vocab()) * (192 + 4 * self.n_batch)

    def _lends(self) -> bool:
        return False  # settings are compared at the same pool, which stays as it is

    def words(self, text: str, begin: bool) -> List[int]:
        # llama-cpp-python adds the begin token when it is asked to; only some models want it
        first = [int(self.token_bos())] if begin and self._model.add_bos_token() else []
        return first + [int(t) for t in self.tokenize(text.encode("utf-8"), add_bos=False, special=False)]

    def restart(self) -> None:
        context: Any = self._ctx
        context.kv_cache_clear()
        self.n_tokens = 0
        if self._session is not None:
            self._session.begin_sequence()

    def feed(self, tokens: Sequence[int]) -> Logits:
        self._batch.set_batch(batch=list(tokens), n_past=self.n_tokens, logits_all=True)
        with nullcontext() if self._session is None else self._session.decoding(len(tokens)):
            self._ctx.decode(self._batch)
        self.n_tokens += len(tokens)
        context: Any = self._ctx
        rows = np.ctypeslib.as_array(context.get_logits(), shape=(len(tokens) * self.vocabulary,))
        return rows.reshape(len(tokens), self.vocabulary)

    def rewind(self, n: int) -> bool:
        if not self._ctx.kv_cache_seq_rm(-1, n, -1):
            return False
        self.n_tokens = n
        return True

    def close(self) -> None:
        super().close()
        if not self.__dict__.get("_given_back"):  # __del__ comes here again
            self._given_back = True
            gc.collect()
            _memory.give_back()  # for the model of the next setting

    def counts(self) -> Optional[OffloadStats]:
        return None if self._session is None else self.offload_stats()

    def forget_counts(self) -> None:
        if self._session is not None:
            self.reset_offload_stats()
