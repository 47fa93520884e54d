"""A scheduler's `Step` becomes one forward pass over the paged cache, and tokens of every sequence that draws.

Holds what stays on the device from step to step: the cache, and the tokens drawn last. It decides nothing.
"""

from __future__ import annotations

from collections import abc
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv2.config.engine import EngineConfig
from dsv2.device import to_device, to_host
from dsv2.engine.batch import Batch, accept
from dsv2.engine.decode import token_ids
from dsv2.engine.draft import DraftModel, Guesses
from dsv2.engine.draw import Candidates, Sampler, candidates, log_probs_of
from dsv2.engine.paged import PagedModel, allocate_pages
from dsv2.engine.scheduler import Scheduled, Step
from dsv2.model import Transformer

LOGITS_ROWS = 1024
"""Rows of the prompt whose logits exist at once."""

_NO_MASKS: abc.Mapping[int, np.ndarray] = MappingProxyType({})


class Drawn(NamedTuple):
    """A token and its log-probability under the softmax of the model's logits.

    Where log-probabilities were asked for: its rank (1: the most probable), and the most probable tokens, best first.
    """

    token_id: int
    log_prob: float
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


class Results(NamedTuple):
    """Of a step's entries, in its order."""

    drawn: list[list[Drawn]]
    """Of an entry that samples: its drafts as far as they were right, and the token after them."""
    prompt: list[list[Drawn] | None]
    """Of an entry whose prompt's log-probabilities are wanted: the prompt's token after each of its positions."""


class Runner:
    """Computes steps with a model's own parameters, in its dtype, over `num_pages` pages of one allocation.

    `draft_model` draws the drafts that steps leave open; no step then has pending tokens.
    """

    def __init__(
        self, model: Transformer, num_pages: int, config: EngineConfig, draft_model: Transformer | None = None
    ) -> None:
        self.model = model
        max_drawn = config.max_num_seqs * (1 + config.num_draft_tokens)
        self._previous_ids = torch.zeros(max_drawn, dtype=torch.int64, device=model.device)
        self._sources: abc.Mapping[int, int] = {}
        self.cache_LPX, *drafts_LPX = allocate_pages(num_pages, model, *([draft_model] if draft_model else []))
        self._paged = PagedModel(model, self.cache_LPX, self._previous_ids, config)
        self._sampler = Sampler(model.cfg, model.device)
        self._drafts = None
        if draft_model is not None:
            self._drafts = DraftModel(draft_model, drafts_LPX[0], self._previous_ids, config)

    @torch.inference_mode()
    def launch(self, step: Step, masks: abc.Mapping[int, np.ndarray] = _NO_MASKS) -> Ticket:
        """Start a step. Does not wait for a GPU: tokens that the step before draws are read where they are.

        `masks`: by arrival, bits [ceil(W / 32)] int32 of the tokens that a sequence may draw; none of it has drafts.
        """
        guesses = None if self._drafts is None else self._drafts.propose(step)
        sources = self._sources if guesses is None else guesses.places
        batch = Batch.of(step.entries, can_absorb=self._paged.can_absorb, sources=sources)
        hidden_TD = self._paged.hidden(batch)
        prompt, drawn = self._prompt(batch, hidden_TD), None
        self._sources = {}
        if batch.sampling:
            rows = batch.drawing_rows()
            is_all = len(rows) == len(hidden_TD)
            logits_NW = self.model.logits(hidden_TD if is_all else hidden_TD[to_device(rows, self.model.device)])
            drawn = self._draw(batch, logits_NW, batch.tokens.sources[rows], masks)
        return Ticket(step, batch, prompt, drawn, guesses, self.model.device)

    def _draw(
        self, batch: Batch, logits_NW: Tensor, sources: np.ndarray, masks: abc.Mapping[int, np.ndarray]
    ) -> _OnHost:
        group = self._sampler.group(batch.drawing_sequences)
        pending_N = None
        if group.is_penalised and (sources >= 0).any():
            pending_N = token_ids(-1, to_device(sources, self.model.device), self._previous_ids)
        ids_N, log_probs_N = self._sampler.draw(logits_NW, group, batch.output_numbers(), pending_N, masks)
        self._previous_ids[: len(ids_N)] = ids_N
        self._sources = group.rows
        num = group.num_logprobs
        return _on_host(ids_N, log_probs_N, None if num is None else candidates(logits_NW, ids_N, num))

    def _prompt(self, batch: Batch, hidden_TD: Tensor) -> dict[int, list[_OnHost]]:
        """By arrival: what is asked of the tokens of prompts."""
        results = {}
        for entry, stop in zip(batch.entries, batch.stops.tolist(), strict=True):
            num = wanted_prompt_logprobs(entry)
            if num is not None:
                after = min(entry.start + entry.num_tokens + 1, entry.sequence.num_prompt_tokens)
                ids = entry.sequence.token_ids[entry.start + 1 : after]
                rows_TD = hidden_TD[stop - entry.num_tokens :][: len(ids)]
                ids_T = to_device(np.array(ids, np.int64), self.model.device)
                chunks = zip(rows_TD.split(LOGITS_ROWS), ids_T.split(LOGITS_ROWS), strict=True)
                results[entry.sequence.arrival] = [self._describe(*chunk, num) for chunk in chunks]
        return results

    def _describe(self, hidden_TD: Tensor, ids_T: Tensor, num: int) -> _OnHost:
        logits_TW = self.model.logits(hidden_TD)
        return _on_host(ids_T, log_probs_of(logits_TW, ids_T), candidates(logits_TW, ids_T, num))


def wanted_prompt_logprobs(entry: Scheduled) -> int | None:
    """How many candidates are wanted beside each token of the prompt; None: nothing is, or not here."""
    sequence = entry.sequence
    is_prompt = sequence.index == 0 and entry.start + 1 < sequence.num_prompt_tokens
    return sequence.params.prompt_logprobs if is_prompt else None


class _OnHost(NamedTuple):
    """Tensors that arrive on the host by and by."""

    ids_N: Tensor
    log_probs_N: Tensor
    candidates: Candidates | None

    def drawn(self, num_candidates: abc.Sequence[int | None]) -> list[Drawn]:
        """With so many candidates each."""
        pairs = zip(self.ids_N.tolist(), self.log_probs_N.tolist(), strict=True)
        if self.candidates is None:
            return [Drawn(*pair) for pair in pairs]
        ranks, top_ids, top_log_probs = (x.tolist() for x in self.candidates)
        rows = zip(pairs, ranks, top_ids, top_log_probs, num_candidates, strict=True)
        return [
            Drawn(*pair) if num is None else Drawn(*pair, rank, tuple(zip(ids[:num], log_probs[:num], strict=True)))
            for pair, rank, ids, log_probs, num in rows
        ]


def _on_host(ids_N: Tensor, log_probs_N: Tensor, of_candidates: Candidates | None) -> _OnHost:
    copies = None if of_candidates is None else Candidates(*map(to_host, of_candidates))
    return _OnHost(to_host(ids_N), to_host(log_probs_N), copies)


class Ticket:
    """A step that was started: all its work is in the device's queue."""

    def __init__(
        self,
        step: Step,
        batch: Batch,
        prompt: abc.Mapping[int, list[_OnHost]],
        drawn: _OnHost | None,
        guesses: Guesses | None,
        device: torch.device,
    ) -> None:
        self.step = step
        self._batch, self._prompt, self._drawn, self._guesses = batch, prompt, drawn, guesses
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def results(self) -> Results:
        """What the step gave; waits until it is done."""
        if self._event is not None:
            self._event.synchronize()
        drawn = self._drawn_by_arrival()
        arrivals = [entry.sequence.arrival for entry in self.step.entries]
        return Results(
            [drawn.get(arrival, []) for arrival in arrivals], [self._of_prompt(e) for e in self.step.entries]
        )

    def _drawn_by_arrival(self) -> dict[int, list[Drawn]]:
        if self._drawn is None:
            return {}
        sequences = self._batch.drawing_sequences
        drawn = self._drawn.drawn([s.params.logprobs for s in sequences])
        if len(drawn) == len(self._batch.sampling):
            return {s.arrival: [each] for s, each in zip(sequences, drawn, strict=True)}
        rest, results = iter(drawn), {}
        for entry, _ in self._batch.sampling:
            tokens = [next(rest) for _ in range(1 + len(entry.draft_ids))]
            draft_ids = entry.draft_ids if self._guesses is None else self._guesses.of(entry)
            num = accept(draft_ids, [each.token_id for each in tokens])
            results[entry.sequence.arrival] = tokens[:num]
        return results

    def _of_prompt(self, entry: Scheduled) -> list[Drawn] | None:
        chunks = self._prompt.get(entry.sequence.arrival)
        if chunks is None:
            return None
        num = entry.sequence.params.prompt_logprobs
        return [each for chunk in chunks for each in chunk.drawn([num] * len(chunk.ids_N))]
