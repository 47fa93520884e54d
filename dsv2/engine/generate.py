"""Plain batched generation with a latent cache: prefill in the expanded form, decode in the absorbed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsv2.kernels.sample import sample
from dsv2.model import Cache, Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 restrict nothing. Raises ValueError outside the ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0: no limit)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2^63)")


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt, all in one packed batch. Returns the new ids, in the order given, stop id included.

    Args:
        prompts: token ids of each sequence, at least one.
        stop_ids: ids that end a sequence; None: the model's `eos_token_id`.
        on_token: called with (prompt index, token id) as each is known.

    A sequence samples from a stream of its own, seeded by `sampling.seed` plus its index, so that it draws the same
    whatever else is in the batch. Raises ValueError for an empty prompt, an id outside the vocabulary, or no tokens
    to make.
    """
    sampling = sampling or Sampling()
    _check(model, prompts, max_new_tokens)
    stops = frozenset(model.cfg.eos_token_ids if stop_ids is None else stop_ids)
    if not prompts:
        return []
    capacity = max(map(len, prompts)) + max_new_tokens
    cache = Cache(model.cfg, num_slots=len(prompts), capacity=capacity, device=model.device, dtype=model.dtype)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    new = [list(p) for p in prompts]
    for i in range(max_new_tokens):
        tokens_T = torch.tensor([t for rows in new for t in rows], device=model.device)
        context = cache.extend([len(rows) for rows in new], absorb=i > 0 and model.cfg.attention.kind == "mla")
        last_B = torch.tensor([*accumulate(len(rows) for rows in new if rows)], device=model.device) - 1
        logits_BW = model.logits(model.model(tokens_T, context)[last_B])
        ids_B = draw(logits_BW, sampling, [sampling.seed + index for index in running], step=i)
        new = [[] for _ in prompts]
        for index, token in zip(running, ids_B.tolist(), strict=True):
            outputs[index].append(token)
            new[index] = [] if token in stops else [token]
            if on_token is not None:
                on_token(index, token)
        running = [index for index in running if new[index]]
        if not running:
            break
    return outputs


def draw(logits_BW: Tensor, sampling: Sampling, seeds: Sequence[int], step: int) -> Tensor:
    """One id a row [B] int64: temperature, then top-k, then top-p. A row's noise depends on its seed and step alone."""
    if sampling.temperature == 0:
        return logits_BW.argmax(-1)
    B, W = logits_BW.shape

    def rows(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((B,), value, dtype=dtype, device=logits_BW.device)

    ids_B, _ = sample(
        logits_BW,
        temperature=rows(sampling.temperature, torch.float32),
        top_k=rows(min(sampling.top_k, W), torch.int32),
        top_p=rows(sampling.top_p, torch.float32),
        min_p=rows(0.0, torch.float32),
        seed=torch.tensor([seed % 2**63 for seed in seeds], device=logits_BW.device),
        step=rows(step, torch.int64),
    )
    return ids_B


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: at least one token (such as BOS) is needed")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= model.cfg.vocab_size:
            raise ValueError(
                f"prompt {i}: token id {low if low < 0 else high} is outside the vocabulary of {model.cfg.vocab_size}"
            )
