"""One budget for the expert pool and for the buffers that a batch is computed in.

A token touches a megabyte of llama.cpp's compute buffers, a prompt of 512 tokens a hundred, of 2048 four hundred; only the
largest n_ubatch says what they are allocated for. So a prompt borrows them from the pool, which loses the experts that are worth
least, and soon after the prompt the pool has them back. Bytes throughout.
"""

from __future__ import annotations

from typing import Optional, Tuple

__all__ = ["COMMON", "COMMON_WITHOUT_FLASH", "LEAST", "SMALL", "BatchRoom"]

COMMON = 2048
"""Tokens of a batch by default (commands). A batch reads each expert once, and its buffers cost nothing afterwards."""
COMMON_WITHOUT_FLASH = 512
"""Without flash attention half as much is worked in as the buffers take, and stays; both grow with the context."""
LEAST = 512
"""What a budget has to have room for, or n_ubatch if that is less: longer batches are cut where memory is short."""

SMALL = 16
"""Tokens of a batch that there is always room for: one of each sequence, or what a draft proposes."""

Taken = Tuple[int, int]

# A layout serves prompts of similar lengths.
_STEP = 64
# So many small batches in a row end a prompt: its buffers go back to the pool. With drafts small and larger ones take turns.
_QUIET = 4


class BatchRoom:
    """How the rest of a budget is divided, from batch to batch.

    What a layout takes is told as `hobbit_context_fit` does: (bytes of buffers, bytes of what ggml works in). The latter stay
    once they were touched.

    Args:
        n_ubatch: tokens of the largest batch.
        most, small: what the layouts for it and for SMALL tokens take.
        spare: for the pool and both of these.
        least: the smallest pool.
    """

    def __init__(self, n_ubatch: int, most: Taken, small: Taken, spare: int, least: int) -> None:
        self._n_ubatch, self.spare, self._least = n_ubatch, spare, least
        self._per_token = sum(most) / n_ubatch
        self._small = self._buffers = small[0]
        self._laid_out = SMALL
        self._work = small[1]
        self._quiet = 0

    @property
    def lent(self) -> int:
        """Of `spare` to the batches, now."""
        return self._buffers + self._work

    @property
    def borrowed(self) -> int:
        """Of that, what the pool has back when a prompt is over."""
        return self._buffers - self._small

    @property
    def pool(self) -> int:
        """What is left for the pool."""
        return self.spare - self.lent

    def largest(self, wanted: int) -> int:
        """Of `wanted` tokens, those that can be one batch: more would leave the pool less than its least."""
        fit = int((self.spare - self._least) / self._per_token)
        return max(min(wanted, fit), min(wanted, SMALL))

    def to_lay_out(self, n_tokens: int) -> Optional[int]:
        """Before a batch: the tokens that buffers have to be laid out for; None: as they are."""
        n_tokens = min(n_tokens, self._n_ubatch)
        if n_tokens > SMALL:
            self._quiet = 0
            return None if n_tokens <= self._laid_out else min(-(-n_tokens // _STEP) * _STEP, self._n_ubatch)
        self._quiet += 1
        return SMALL if self._laid_out > SMALL and self._quiet >= _QUIET else None

    def laid_out(self, n_tokens: int, taken: Taken) -> None:
        """They are, for so many."""
        self._buffers, work = taken
        self._laid_out = n_tokens
        self._work = max(self._work, work)
