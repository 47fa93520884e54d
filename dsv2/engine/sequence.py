"""A request and the sequences it is answered with: their tokens, where they stand and which pages they hold.

State only: the scheduler decides what happens to it.
"""

from __future__ import annotations

from array import array
from collections import abc
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.blocks import page_key, root_key
from dsv2.engine.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again, its pages taken, its tokens kept."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n answers.

    Position p of the cache holds what the model keeps of token_ids[p]; it is at offset p % 64 of page pages[p // 64].
    """

    request_id: str
    index: int
    """Which of the request's sequences."""
    params: SamplingParams
    token_ids: list[int]
    """Prompt, then output, as far as it is known."""
    num_prompt_tokens: int
    root_key: bytes
    arrival: int = -1
    """How many sequences arrived before, once this one has."""
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    pages: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Positions in the cache, those included that steps in flight write."""
    num_pending_tokens: int = 0
    """Tokens that steps in flight sample: at least so many."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were in the cache when the sequence first ran."""
    num_preemptions: int = 0
    _page_keys: list[bytes] = field(default_factory=list, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, known or pending, that no step has computed yet. Below 1 while drafts await their verdict."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def page_key(self, page_idx: int) -> bytes:
        """Key of the sequence's page `page_idx`, whose 64 tokens are known."""
        assert (page_idx + 1) * PAGE_SIZE <= self.num_tokens, (
            f"page {page_idx} is not full with {self.num_tokens} tokens"
        )
        keys = self._page_keys
        for i in range(len(keys), page_idx + 1):
            parent = keys[-1] if keys else self.root_key
            keys.append(page_key(parent, self.token_ids[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]))
        return keys[page_idx]


class Request:
    """A prompt and `params.n` sequences that continue it; log-probabilities of the prompt come with the first."""

    def __init__(
        self, request_id: str, prompt_ids: abc.Iterable[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> None:
        """`cache_salt`: only requests of the same one share pages; what adapter is in use belongs there.

        Raises ValueError for an empty prompt and for what is no token id.
        """
        self.id = request_id
        ids = _token_ids(request_id, prompt_ids)
        root = root_key(cache_salt)
        self.sequences = [Sequence(request_id, i, params, list(ids), len(ids), root) for i in range(params.n)]

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


def _token_ids(request_id: str, prompt_ids: abc.Iterable[int]) -> list[int]:
    try:
        ids = array("q", list(prompt_ids)).tolist()
    except (TypeError, OverflowError) as error:
        raise ValueError(f"request {request_id!r}: prompt must be token ids: {error}") from error
    if not ids:
        raise ValueError(f"request {request_id!r}: prompt is empty, at least one token (such as BOS) is needed")
    if min(ids) < 0:
        raise ValueError(f"request {request_id!r}: token id {min(ids)} must not be negative")
    return ids
