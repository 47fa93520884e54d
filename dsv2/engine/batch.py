"""Entries of a scheduler's `Step`, laid out as the rows of one forward pass. Numbers on the host; no torch.

Sequences of few tokens come first: they attend in MLA's absorbed form, those of longer chunks in the expanded one.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsv2.config.engine import MAX_DRAFT_TOKENS, PAGE_SIZE
from dsv2.engine.scheduler import Scheduled
from dsv2.engine.sequence import Sequence

MAX_ABSORBED_TOKENS = 1 + MAX_DRAFT_TOKENS
"""Tokens up to which a sequence's part of a step counts as decoding."""


class Tokens(NamedTuple):
    """Ids [T] int64, and for those that the host does not know (id 0) where they are on the device, otherwise -1."""

    ids: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class Batch:
    """`entries` in the order of their rows; the first `num_absorbed` entries attend in the absorbed form.

    `sources`: by arrival, which of the ids on the device is the first that the host does not know; others follow it.
    """

    entries: list[Scheduled]
    num_absorbed: int
    sources: abc.Mapping[int, int]

    @staticmethod
    def of(entries: abc.Iterable[Scheduled], *, can_absorb: bool, sources: abc.Mapping[int, int]) -> Batch:
        absorbed, expanded = [], []
        for entry in entries:
            is_absorbed = can_absorb and entry.num_tokens <= MAX_ABSORBED_TOKENS
            (absorbed if is_absorbed else expanded).append(entry)
        return Batch(absorbed + expanded, len(absorbed), sources)

    @cached_property
    def starts(self) -> np.ndarray:
        """Tokens in the cache before each entry's, [B] int64."""
        return np.fromiter((entry.start for entry in self.entries), np.int64, len(self.entries))

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows of each entry, [B] int64."""
        return np.fromiter((entry.num_tokens for entry in self.entries), np.int64, len(self.entries))

    @cached_property
    def stops(self) -> np.ndarray:
        """The row after each entry's last, [B] int64."""
        return self.counts.cumsum()

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def is_decode(self) -> bool:
        return self.num_absorbed == len(self.entries)

    @cached_property
    def tokens(self) -> Tokens:
        """To be asked for before the scheduler is told anything else."""
        ids: list[int] = []
        sources = np.full(self.num_rows, -1, np.int64)
        for entry, stop in zip(self.entries, self.stops.tolist(), strict=True):
            known = entry.known_ids()
            num_unknown = entry.num_tokens - len(known)
            if num_unknown:
                first = self.sources[entry.sequence.arrival]
                sources[stop - num_unknown : stop] = range(first, first + num_unknown)
            ids += known + [0] * num_unknown
        return Tokens(np.array(ids, dtype=np.int64), sources)

    def page_table(self) -> np.ndarray:
        """[B, P] int32, zeros after an entry's last page."""
        rows = [entry.sequence.pages for entry in self.entries]
        table = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Every row as a history of its own: (position, slot, tokens it sees) [3, T] int64, and pages [T, P] int32."""
        entry_T = np.repeat(np.arange(len(self.entries)), self.counts)
        position_T = np.arange(self.num_rows) + np.repeat(self.starts - (self.stops - self.counts), self.counts)
        table_TP = self.page_table()[entry_T]
        page_T = table_TP[np.arange(self.num_rows), position_T // PAGE_SIZE].astype(np.int64)
        return np.stack((position_T, page_T * PAGE_SIZE + position_T % PAGE_SIZE, position_T + 1)), table_TP

    # What is drawn ------------------------------------------------------------------------------------------------

    @cached_property
    def sampling(self) -> list[tuple[Scheduled, int]]:
        """The entries that draw tokens, and the first row after which each does."""
        pairs = zip(self.entries, self.stops.tolist(), strict=True)
        return [(entry, stop - 1 - len(entry.draft_ids)) for entry, stop in pairs if entry.samples]

    @cached_property
    def num_draws(self) -> np.ndarray:
        """Tokens that each sampling entry draws: 1 + its drafts, [S] int64."""
        return np.fromiter((1 + len(entry.draft_ids) for entry, _ in self.sampling), np.int64, len(self.sampling))

    def drawing_rows(self) -> np.ndarray:
        """The rows after which tokens are drawn, [N] int64: those of a sampling entry side by side."""
        return self._drawn(np.fromiter((first for _, first in self.sampling), np.int64, len(self.sampling)))

    def output_numbers(self) -> np.ndarray:
        """How many tokens its sequence generated before each that is drawn, [N] int64."""
        return self._drawn(np.fromiter((num_drawn(entry) for entry, _ in self.sampling), np.int64, len(self.sampling)))

    def _drawn(self, first_S: np.ndarray) -> np.ndarray:
        """Consecutive numbers from each sampling entry's first on, as many as it draws."""
        offset_S = self.num_draws.cumsum() - self.num_draws
        return np.arange(self.num_draws.sum()) + np.repeat(first_S - offset_S, self.num_draws)

    @cached_property
    def drawing_sequences(self) -> list[Sequence]:
        """[N], whose token each is."""
        return [entry.sequence for entry, _ in self.sampling for _ in range(1 + len(entry.draft_ids))]


def num_drawn(entry: Scheduled) -> int:
    """Tokens that the sequence has generated before the first one that the entry draws."""
    return entry.start + entry.num_tokens - len(entry.draft_ids) - entry.sequence.num_prompt_tokens


def accept(draft_ids: abc.Sequence[int], drawn_ids: abc.Sequence[int]) -> int:
    """How many of the 1 + len(draft_ids) drawn tokens follow from each other: the drafts that were drawn, and one more.

    Each was drawn by its own key after a history that holds the drafts before it, as it would have been without any.
    """
    num_right = 0
    while num_right < len(draft_ids) and draft_ids[num_right] == drawn_ids[num_right]:
        num_right += 1
    return num_right + 1
