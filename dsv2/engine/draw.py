"""Tokens from logits by each sequence's `SamplingParams`, on the device: `kernels.sample` and what goes before it.

Log-probabilities are the model's own: no bias, penalty, mask or temperature changes them.
"""

from __future__ import annotations

import math
from collections import abc
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv2.config import ModelConfig
from dsv2.device import to_device
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.sequence import Sequence
from dsv2.kernels.sample import sample

_UNSEEDED = -(2**62)
"""Seed of the first sequence that was given none; later arrivals have the next ones."""


class Candidates(NamedTuple):
    """Of N tokens the rank (1: the most probable) [N] int64, and the most probable ids and log-probabilities [N, k]."""

    ranks_N: Tensor
    ids_Nk: Tensor
    log_probs_Nk: Tensor


class Group:
    """Sequences that draw together, and what stays the same while they do."""

    def __init__(self, sequences: abc.Sequence[Sequence], arrivals: list[int], device: torch.device) -> None:
        params = [sequence.params for sequence in sequences]
        self.sequences, self.arrivals = sequences, arrivals
        self.rows = {arrival: row for row, arrival in enumerate(arrivals)}
        self.columns = {
            "temperature": column([p.temperature for p in params], device),
            "top_k": column([p.top_k for p in params], device, np.int32),
            "top_p": column([p.top_p for p in params], device),
            "min_p": column([p.min_p for p in params], device),
            "seed": column([_seed(sequence) for sequence in sequences], device, np.int64),
        }
        self.num_logprobs = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        self.is_penalised = any(map(is_penalised, params))
        self.changing_rows = [row for row, p in enumerate(params) if p.logit_bias or p.min_tokens]
        """Whose logits something may be added to."""


def column(values: abc.Sequence[float], device: torch.device, dtype: type = np.float32) -> Tensor:
    """One value a row [N]; what is too large for fp32 becomes the largest number."""
    if dtype is np.float32:
        values = [min(value, float(np.finfo(np.float32).max)) for value in values]
    return to_device(np.array(values, dtype=dtype), device)


class Sampler:
    """Draws for a group at a time, and keeps the last one."""

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        self.device, self.vocab_size = device, cfg.vocab_size
        self._eos_token_ids = [i for i in cfg.eos_token_ids if i < cfg.vocab_size]
        self._group = Group((), [], device)

    def group(self, sequences: abc.Sequence[Sequence]) -> Group:
        arrivals = [sequence.arrival for sequence in sequences]
        if arrivals != self._group.arrivals:
            self._group = Group(sequences, arrivals, self.device)
        return self._group

    def draw(
        self,
        logits_NW: Tensor,
        group: Group,
        output_numbers: np.ndarray,
        pending_N: Tensor | None,
        masks: abc.Mapping[int, np.ndarray],
    ) -> tuple[Tensor, Tensor]:
        """Ids [N] int64 and their log-probabilities [N] float32.

        Args:
            logits_NW: of the token after each sequence's history.
            output_numbers: [N] int64, tokens that each sequence generated before.
            pending_N: [N] int64, last tokens of the histories that the host does not know yet, -1 for those it does;
                None where it knows all.
            masks: by arrival, bits [ceil(W / 32)] int32 of the tokens that may come.
        """
        scores_NW = self._adjusted(logits_NW, group, output_numbers, masks)
        ids_N, log_probs_N = sample(
            scores_NW,
            **group.columns,
            step=to_device(output_numbers, self.device),
            **(self._penalties(group.sequences, pending_N) if group.is_penalised else {}),
        )
        if scores_NW is not logits_NW:
            log_probs_N = log_probs_of(logits_NW, ids_N)
        return ids_N, log_probs_N

    # Logits -------------------------------------------------------------------------------------------------------

    def _adjusted(
        self, logits_NW: Tensor, group: Group, output_numbers: np.ndarray, masks: abc.Mapping[int, np.ndarray]
    ) -> Tensor:
        """Logits with bias, and without the tokens that may not come; the same tensor where nothing changes."""
        changes = [
            (row, token_id, value)
            for row in group.changing_rows
            for token_id, value in self._changes(group.sequences[row].params, int(output_numbers[row])).items()
        ]
        masked = [(group.rows[arrival], bits) for arrival, bits in masks.items() if arrival in group.rows]
        if not changes and not masked:
            return logits_NW
        scores_NW = logits_NW.to(torch.float32, copy=True)
        if changes:
            rows, token_ids, values = (list(each) for each in zip(*changes, strict=True))
            index = column(rows, self.device, np.int64), column(token_ids, self.device, np.int64)
            scores_NW.index_put_(index, column(values, self.device), accumulate=True)
        if masked:
            rows, bits = zip(*masked, strict=True)
            allowed_nW = self._unpacked(np.stack(bits))
            index = column(rows, self.device, np.int64)
            scores_NW[index] = scores_NW[index].masked_fill(~allowed_nW, -math.inf)
        return scores_NW

    def _changes(self, params: SamplingParams, output_number: int) -> dict[int, float]:
        """What is added to the logits of token ids."""
        changes = dict(params.logit_bias)
        if output_number < params.min_tokens:
            changes |= dict.fromkeys(params.stop_token_ids, -math.inf)
            if not params.ignore_eos:
                changes |= dict.fromkeys(self._eos_token_ids, -math.inf)
        return changes

    def _unpacked(self, bits: np.ndarray) -> Tensor:
        """Bits [n, ceil(W / 32)] int32 as bool [n, W]."""
        words = to_device(bits, self.device)
        shifts = torch.arange(32, dtype=torch.int32, device=self.device)
        return ((words[:, :, None] >> shifts) & 1).flatten(1)[:, : self.vocab_size].bool()

    # Penalties ----------------------------------------------------------------------------------------------------

    def _penalties(self, sequences: abc.Sequence[Sequence], pending_N: Tensor | None) -> dict[str, Tensor]:
        """The penalties' arguments of `sample`."""
        params = [sequence.params for sequence in sequences]
        shape = (len(sequences), self.vocab_size)
        output_counts, prompt_mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        for row, sequence in enumerate(sequences):
            if is_penalised(sequence.params):
                output_counts[row] = np.bincount(np.array(sequence.output_ids, np.int64), minlength=shape[1])
                prompt_mask[row, sequence.token_ids[: sequence.num_prompt_tokens]] = True
        counts_NW = to_device(output_counts, self.device)
        if pending_N is not None:
            index = pending_N.clamp(min=0)[:, None]
            counts_NW.scatter_add_(1, index, (pending_N >= 0).to(torch.int32)[:, None])
        return {
            "output_counts": counts_NW,
            "prompt_mask": to_device(prompt_mask, self.device),
            "presence_penalty": column([p.presence_penalty for p in params], self.device),
            "frequency_penalty": column([p.frequency_penalty for p in params], self.device),
            "repetition_penalty": column([p.repetition_penalty for p in params], self.device),
        }


def log_probs_of(logits_NW: Tensor, ids_N: Tensor) -> Tensor:
    """Log-probabilities [N] float32 of `ids_N` under softmax(logits), in fp32."""
    raw_NW = logits_NW.float()
    return raw_NW.gather(-1, ids_N[:, None]).squeeze(-1) - raw_NW.logsumexp(-1)


def candidates(logits_NW: Tensor, ids_N: Tensor, num: int) -> Candidates:
    """What came beside tokens `ids_N`: their ranks, and the `num` most probable; equal logits rank by the lower id."""
    raw_NW = logits_NW.float()
    chosen_N = raw_NW.gather(-1, ids_N[:, None])
    before_NW = torch.arange(raw_NW.shape[1], device=ids_N.device) < ids_N[:, None]
    ranks_N = 1 + ((raw_NW > chosen_N) | ((raw_NW == chosen_N) & before_NW)).sum(-1)
    best_Nk, best_ids_Nk = raw_NW.topk(min(num, raw_NW.shape[1]), -1)
    return Candidates(ranks_N, best_ids_Nk, best_Nk - raw_NW.logsumexp(-1, keepdim=True))


def is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _seed(sequence: Sequence) -> int:
    """Key of the sequence's random numbers, 64 bits with sign."""
    if sequence.params.seed is None:
        return _UNSEEDED + sequence.arrival
    return (sequence.params.seed + sequence.index + 2**63) % 2**64 - 2**63
