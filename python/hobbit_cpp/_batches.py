"""One budget for the expert pool and for the buffers that a batch is computed in.

A token touches a megabyte of llama.cpp's compute buffers, a prompt of 512 tokens a hundred, of 2048 four hundred; only the
largest n_ubatch says what they are allocated for. So a prompt borrows them from the pool, which loses the experts that are worth
least, and soon after the prompt the pool has them back. Bytes throughout.
"""

from __future__ import annotations

from typing import Optional, Tuple

__all__ = ["COMMON", "COMMON_NOT_LENT", "LEAST", "SMALL", "BatchRoom"]

COMMON = 2048
"""Tokens of a batch by default (commands). A batch reads each expert once, and its buffers cost nothing afterwards."""
COMMON_NOT_LENT = 512
"""As llama.cpp has it: where the buffers cannot be lent, and without flash attention, where half as much is worked in as they
take, and stays; both grow with the context."""
LEAST = 128
"""What a budget has to have room for, or n_ubatch if that is less: longer batches are cut where memory is short."""

SMALL = 16
"""Tokens of a batch that there is always room for: one of each sequence, or what a draft proposes."""

Taken = Tuple[int, int]

# A layout serves prompts of similar lengths.
_STEP = 64
# So many batches in a row of less than half of what is laid out end a prompt: what they do not need goes back to the pool.
_QUIET = 4


class BatchRoom:
    """How the rest of a budget is divided, from batch to batch.

    What a layout takes is told as `hobbit_context_fit` does: (bytes of buffers, bytes of what ggml works in). The latter stay
    once they were touched.

    Args:
        n_ubatch: tokens of the largest batch.
        most, small: what the layouts for it and for SMALL tokens take.
        spare: for the pool and both of these.
        floor, ceiling: the smallest pool, and the largest.
    """

    def __init__(self, n_ubatch: int, most: Taken, small: Taken, spare: int, floor: int, ceiling: int) -> None:
        self.spare, self.ceiling = spare, ceiling
        self._n_ubatch, self._floor = n_ubatch, floor
        self._per_token = sum(most) / n_ubatch
        self._small = self._buffers = small[0]
        self._laid_out = SMALL
        self._work = small[1]
        self._quiet = self._recent = 0

    @property
    def pool(self) -> int:
        """What the pool may have now."""
        return max(min(self.spare - self._buffers - self._work, self.ceiling), self._floor)

    def resize(self, pool: int, least: int) -> int:
        """Makes it one of `pool` bytes between prompts, with room for a batch that takes `least` beside the smallest pool.

        Returns:
            By how much the budget grows.
        """
        before = self.spare
        self.ceiling = pool
        self.spare = max(pool + self._small + self._work, self._floor + least)
        return self.spare - before

    def largest(self, wanted: int, withheld: int = 0) -> int:
        """Of `wanted` tokens, those that can be one batch: more would leave the pool less than its least.

        Args:
            withheld: of what the pool may have, what it has not.
        """
        fit = int((self.spare - withheld - self._floor) / self._per_token)
        if fit >= self._n_ubatch:
            return wanted
        return min(wanted, max(fit // _STEP * _STEP, SMALL))

    def to_lay_out(self, n_tokens: int) -> Optional[int]:
        """Before a batch: the tokens that buffers have to be laid out for; None: as they are."""
        n_tokens = min(n_tokens, self._n_ubatch)
        needed = SMALL if n_tokens <= SMALL else min(-(-n_tokens // _STEP) * _STEP, self._n_ubatch)
        if 2 * needed > self._laid_out:
            self._quiet = self._recent = 0
            return needed if needed > self._laid_out else None
        self._quiet += 1
        self._recent = max(self._recent, needed)
        return self._recent if self._quiet >= _QUIET else None

    def laid_out(self, n_tokens: int, taken: Taken) -> None:
        """They are, for so many."""
        self._buffers, work = taken
        self._laid_out = n_tokens
        self._work = max(self._work, work)
        self._quiet = self._recent = 0
