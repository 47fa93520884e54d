"""Plain batched generation with a latent cache: prefill in the expanded form, decode in the absorbed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    A sequence samples from a generator of its own, seeded by `sampling.seed` and its index, so that it draws the same
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
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    new = [list(p) for p in prompts]
    for i in range(max_new_tokens):
        tokens_T = torch.tensor([t for rows in new for t in rows], device=model.device)
        context = cache.extend([len(rows) for rows in new], absorb=i > 0 and model.cfg.attention.kind == "mla")
        last = torch.tensor([s.stop - 1 for s in context.segments], device=model.device)
        logits_BW = model.logits(model.model(tokens_T, context)[last]).float().cpu()
        new = [[] for _ in prompts]
        for index, logits_W in zip(running, logits_BW, strict=True):
            token = sample(logits_W, sampling, generators[index])
            outputs[index].append(token)
            new[index] = [] if token in stops else [token]
            if on_token is not None:
                on_token(index, token)
        running = [index for index in running if new[index]]
        if not running:
            break
    return outputs


def sample(logits_W: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from next-token logits [W] fp32: temperature, then top-k, then top-p (nucleus)."""
    if sampling.temperature == 0:
        return int(logits_W.argmax())
    # Differences to the largest, in fp64, stay numbers however small the temperature.
    probs_W = ((logits_W - logits_W.max()).double() / sampling.temperature).softmax(-1)
    sorted_W, order_W = probs_W.sort(descending=True, stable=True)
    if sampling.top_k:
        sorted_W[sampling.top_k :] = 0
    if sampling.top_p < 1:
        # Keep the smallest set whose mass reaches top_p: drop an id once those before it suffice.
        sorted_W[sorted_W.cumsum(0) - sorted_W >= sampling.top_p * sorted_W.sum()] = 0
    return int(order_W[torch.multinomial(sorted_W, 1, generator=generator)])


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
