"""A smaller model guesses tokens ahead, which the model then verifies together, in the same step.

It lies over the same page numbers and computes the very rows that the model does, the drafts among them. So prefixes,
preemption and drafts that were wrong are to it what they are to the model, and nothing is kept here between steps.
Guesses only: whether one is right is for the model to say.
"""

from __future__ import annotations

from collections import abc
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dsv2.config.engine import EngineConfig
from dsv2.config.schema import require
from dsv2.device import to_device, to_host
from dsv2.engine.batch import Batch
from dsv2.engine.draw import Sampler
from dsv2.engine.paged import PagedModel
from dsv2.engine.scheduler import Scheduled, Step
from dsv2.model import Transformer


class Guesses(NamedTuple):
    """A step's drafts: by arrival where a sequence's first is among them, and their ids [N] int64, on the host by and
    by."""

    places: abc.Mapping[int, int]
    ids_N: Tensor

    def of(self, entry: Scheduled) -> list[int]:
        first = self.places[entry.sequence.arrival]
        return self.ids_N[first : first + len(entry.draft_ids)].tolist()


class DraftModel:
    """Draws the drafts that a step leaves open.

    Each is drawn by the parameters of its sequence and with the random numbers by which the model will draw the token
    of that place: where the two models' probabilities are alike, so are the tokens. At temperature 0 both take the most
    probable one.
    """

    def __init__(self, model: Transformer, cache_LPX: Tensor, ids: Tensor, config: EngineConfig) -> None:
        """`ids` [max_num_seqs * num_draft_tokens or more] int64 on the device: where the drafts are put."""
        self.model, self._ids = model, ids
        self._paged = PagedModel(model, cache_LPX, ids, config)
        self._sampler = Sampler(model.cfg, model.device)

    def propose(self, step: Step) -> Guesses:
        """Compute a step's rows, drawing its drafts one after the other. Does not wait for a GPU.

        The last draft is computed too, although nothing is drawn after it: if it is right, its position is in the cache
        like any other, and its page may be shared.
        """
        counts = [len(entry.draft_ids) for entry in step.entries]
        firsts = list(accumulate(counts, initial=0))
        places = {entry.sequence.arrival: first for entry, first in zip(step.entries, firsts, strict=False)}
        entries: abc.Sequence[Scheduled] = step.entries
        for i in range(1 + max(counts)):
            sources = {arrival: first + i - 1 for arrival, first in places.items()}
            parts = [_part(entry, i) for entry in entries]
            batch = Batch.of(parts, can_absorb=self._paged.can_absorb, sources=sources)
            hidden_TD = self._paged.hidden(batch)
            if batch.sampling:
                self._draw(batch, hidden_TD, [places[sequence.arrival] + i for sequence in batch.drawing_sequences])
            entries = [entry for entry in entries if len(entry.draft_ids) > i]
        return Guesses(places, to_host(self._ids[: firsts[-1]].clone()))

    def _draw(self, batch: Batch, hidden_TD: Tensor, places: list[int]) -> None:
        device = self.model.device
        logits_NW = self.model.logits(hidden_TD[to_device(batch.drawing_rows(), device)])
        group = self._sampler.group(batch.drawing_sequences)
        ids_N, _ = self._sampler.draw(logits_NW, group, batch.output_numbers(), None, {})
        self._ids.index_copy_(0, to_device(np.array(places, np.int64), device), ids_N)


def _part(entry: Scheduled, num_drawn: int) -> Scheduled:
    """What is computed of an entry once so many of its drafts are drawn: all before them, or else the last of these."""
    num_drafts = len(entry.draft_ids)
    num_known = entry.num_tokens - num_drafts
    start, num_tokens = (entry.start + num_known + num_drawn - 1, 1) if num_drawn else (entry.start, num_known)
    return entry._replace(start=start, num_tokens=num_tokens, draft_ids=(), samples=num_drafts > num_drawn)


def check_draft_model(draft: Transformer, model: Transformer, config: EngineConfig) -> None:
    """ValueError where `draft` cannot draft for `model`, or would have nothing to do."""
    require(
        draft.cfg.vocab_size == model.cfg.vocab_size,
        f"draft_model has a vocabulary of {draft.cfg.vocab_size} tokens, expected the model's {model.cfg.vocab_size}",
    )
    require(
        draft.device == model.device, f"draft_model is on {draft.device}, expected the model's device, {model.device}"
    )
    require(config.num_draft_tokens > 0, "num_draft_tokens=0 with a draft_model: expected 1 or more")
