"""A scheduler's `Step` becomes one forward pass over the paged cache, and a token of every sequence that samples.

The only file of the engine that touches the device. It decides nothing, and keeps nothing between steps but the cache.
Log-probabilities are the model's own: no bias, penalty, mask or temperature changes them.
"""

from __future__ import annotations

import math
from collections import abc
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.config.counts import kv_elements_per_token
from dsv2.config.engine import PAGE_SIZE, EngineConfig
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduled, Step
from dsv2.engine.sequence import Sequence
from dsv2.kernels.mla_decode import MAX_QUERY_TOKENS
from dsv2.kernels.sample import sample
from dsv2.model import Context, Transformer

CPU_CACHE_BYTES = 10**9
"""What the cache may take on the CPU where nobody says how many pages it has."""

_UNSEEDED = -(2**62)
"""Seed of the first sequence that was given none; later arrivals have the next ones."""


class Drawn(NamedTuple):
    token_id: int
    log_prob: float
    """Under the softmax of the model's logits."""


def page_bytes(model: Transformer) -> int:
    """Bytes of a page, all layers together."""
    return PAGE_SIZE * kv_elements_per_token(model.cfg) * model.dtype.itemsize


def default_num_pages(model: Transformer, config: EngineConfig) -> int:
    """As many pages as the sequences of `config` can ever need, or as there is memory for.

    Raises ValueError where there is no room for one.
    """
    needed = config.max_num_seqs * -(-config.max_model_len // PAGE_SIZE)
    budget_bytes = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
        budget_bytes = int(config.gpu_memory_utilization * total_bytes) - (total_bytes - free_bytes)
    num_pages = min(needed, budget_bytes // page_bytes(model))
    if num_pages < 1:
        raise ValueError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} leaves {budget_bytes / 2**20:.0f} MiB for the "
            f"cache, expected at least a page of {page_bytes(model) / 2**20:.1f} MiB on {model.device}"
        )
    return num_pages


class Runner:
    """Computes steps with a model's own parameters, in its dtype, over `num_pages` pages of one allocation."""

    def __init__(self, model: Transformer, num_pages: int) -> None:
        self.model = model
        cfg = model.cfg
        shape = (cfg.num_layers, num_pages, PAGE_SIZE, kv_elements_per_token(cfg) // cfg.num_layers)
        self.cache_LPX = torch.empty(shape, device=model.device, dtype=model.dtype)

    @torch.inference_mode()
    def run(self, step: Step) -> list[Drawn | None]:
        """What each entry draws after its last token; None where it samples none. Entries must have no drafts."""
        entries = step.entries
        tokens_T = torch.tensor([i for entry in entries for i in entry.known_ids()], device=self.model.device)
        hidden_TD = self.model.model(tokens_T, self._context(entries))
        stops = accumulate(entry.num_tokens for entry in entries)
        last = [stop - 1 for entry, stop in zip(entries, stops, strict=True) if entry.samples]
        last_B = torch.tensor(last, dtype=torch.int64, device=self.model.device)
        ids_B, log_probs_B = self._sample(
            self.model.logits(hidden_TD[last_B]), [entry for entry in entries if entry.samples]
        )
        drawn = iter(map(Drawn, ids_B.tolist(), log_probs_B.tolist()))
        return [next(drawn) if entry.samples else None for entry in entries]

    def _context(self, entries: abc.Sequence[Scheduled]) -> Context:
        """Absorbed where every sequence has the same few tokens, as in decoding; expanded otherwise."""
        pages = [entry.sequence.pages for entry in entries]
        width = max(map(len, pages))
        counts = [entry.num_tokens for entry in entries]
        is_decode = len(set(counts)) == 1 and counts[0] <= MAX_QUERY_TOKENS
        return Context.cached(
            self.cache_LPX.unbind(),
            torch.tensor([row + [0] * (width - len(row)) for row in pages], dtype=torch.int32),
            [entry.start for entry in entries],
            counts,
            self.model.cfg.num_heads,
            absorb=is_decode and self.model.cfg.attention.kind == "mla",
        )

    # Sampling -----------------------------------------------------------------------------------------------------

    def _sample(self, logits_BW: Tensor, entries: abc.Sequence[Scheduled]) -> tuple[Tensor, Tensor]:
        """Ids [B] int64 and their log-probabilities [B] float32."""
        params = [entry.sequence.params for entry in entries]
        scores_BW = self._adjusted(logits_BW, entries)
        ids_B, log_probs_B = sample(
            scores_BW,
            temperature=self._column([p.temperature for p in params]),
            top_k=self._column([p.top_k for p in params], torch.int32),
            top_p=self._column([p.top_p for p in params]),
            min_p=self._column([p.min_p for p in params]),
            seed=self._column([_seed(entry.sequence) for entry in entries], torch.int64),
            step=self._column([_num_drawn(entry) for entry in entries], torch.int64),
            **self._penalties([entry.sequence for entry in entries]),
        )
        if scores_BW is not logits_BW:
            raw_BW = logits_BW.float()
            log_probs_B = raw_BW.gather(-1, ids_B[:, None]).squeeze(-1) - raw_BW.logsumexp(-1)
        return ids_B, log_probs_B

    def _column(self, values: list[float] | list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """One value a row [B]; what is too large for fp32 becomes the largest number."""
        if dtype == torch.float32:
            values = [min(value, torch.finfo(dtype).max) for value in values]
        return torch.tensor(values, dtype=dtype, device=self.model.device)

    def _adjusted(self, logits_BW: Tensor, entries: abc.Sequence[Scheduled]) -> Tensor:
        """Logits with bias, and without the tokens that may not come yet; the same tensor where nothing changes."""
        cfg = self.model.cfg
        eos_token_ids = [i for i in cfg.eos_token_ids if i < cfg.vocab_size]
        changes = [
            (row, token_id, value)
            for row, entry in enumerate(entries)
            for token_id, value in _changes(entry, eos_token_ids).items()
        ]
        if not changes:
            return logits_BW
        rows, token_ids, values = (list(column) for column in zip(*changes, strict=True))
        index = self._column(rows, torch.int64), self._column(token_ids, torch.int64)
        return logits_BW.to(torch.float32, copy=True).index_put_(index, self._column(values), accumulate=True)

    def _penalties(self, sequences: abc.Sequence[Sequence]) -> dict[str, Tensor]:
        """The penalties' arguments of `sample`, none where no sequence has any."""
        params = [sequence.params for sequence in sequences]
        if not any(map(_is_penalised, params)):
            return {}
        shape, device = (len(sequences), self.model.cfg.vocab_size), self.model.device
        output_counts, prompt_mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            if _is_penalised(sequence.params):
                output_ids = torch.tensor(sequence.output_ids, dtype=torch.int64)
                output_counts[row] = torch.bincount(output_ids, minlength=shape[1])
                prompt_mask[row, torch.tensor(sequence.token_ids[: sequence.num_prompt_tokens])] = True
        return {
            "output_counts": output_counts.to(device),
            "prompt_mask": prompt_mask.to(device),
            "presence_penalty": self._column([p.presence_penalty for p in params]),
            "frequency_penalty": self._column([p.frequency_penalty for p in params]),
            "repetition_penalty": self._column([p.repetition_penalty for p in params]),
        }


def _num_drawn(entry: Scheduled) -> int:
    """Tokens that the sequence has generated before the one it draws."""
    return entry.start + entry.num_tokens - entry.sequence.num_prompt_tokens


def _seed(sequence: Sequence) -> int:
    """Key of the sequence's random numbers, 64 bits with sign."""
    if sequence.params.seed is None:
        return _UNSEEDED + sequence.arrival
    return (sequence.params.seed + sequence.index + 2**63) % 2**64 - 2**63


def _changes(entry: Scheduled, eos_token_ids: abc.Iterable[int]) -> dict[int, float]:
    """What is added to the logits of token ids."""
    params = entry.sequence.params
    changes = dict(params.logit_bias)
    if _num_drawn(entry) < params.min_tokens:
        changes |= dict.fromkeys(params.stop_token_ids, -math.inf)
        if not params.ignore_eos:
            changes |= dict.fromkeys(eos_token_ids, -math.inf)
    return changes


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
