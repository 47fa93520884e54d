"""Drafts for speculation without a draft model: what followed the last time that a sequence's last tokens stood there.

Also known as prompt lookup. It pays where outputs repeat their prompt or themselves: edits, quotations, code. Guesses
only: whether one is right is for the model to say. Needs no torch.
"""

from __future__ import annotations

from collections import abc

MIN_TOKENS, MAX_TOKENS = 2, 4
"""Tokens that must have stood before in the same order. Shorter runs repeat by chance, longer ones are rare."""


class NgramDrafts:
    """Proposals for one sequence, which may grow but not change between calls.

    Every run of `min_n` to `max_n` tokens is entered once, when a token follows it: a token costs `max_n - min_n + 1`
    entries, and a proposal as many look-ups, however long the sequence is.
    """

    def __init__(self, min_n: int = MIN_TOKENS, max_n: int = MAX_TOKENS) -> None:
        """Raises ValueError unless 1 <= min_n <= max_n."""
        if not 1 <= min_n <= max_n:
            raise ValueError(f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n")
        self._sizes = range(max_n, min_n - 1, -1)
        self._followers: dict[tuple[int, ...], int] = {}  # where the token after the run's latest occurrence stands
        self._num_entered = 0  # tokens whose runs before them are entered

    def propose(self, token_ids: abc.Sequence[int], num_tokens: int) -> list[int]:
        """`num_tokens` ids that may follow; none where not even the last `min_n` tokens stood before.

        The longest run that did is taken at its latest occurrence. Where less than `num_tokens` followed it up to the
        sequence's end, the sequence is taken to go on repeating that.
        """
        self._enter(token_ids)
        end = len(token_ids)
        for size in self._sizes:
            start = self._followers.get(tuple(token_ids[end - size :])) if size < end else None
            if start is not None:
                period = end - start
                return [token_ids[start + i % period] for i in range(num_tokens)]
        return []

    def _enter(self, token_ids: abc.Sequence[int]) -> None:
        for end in range(self._num_entered, len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._followers[tuple(token_ids[end - size : end])] = end
        self._num_entered = len(token_ids)
