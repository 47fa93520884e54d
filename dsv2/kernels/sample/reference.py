"""Sampling in plain torch: penalties, temperature, min-p, top-k, top-p by a sort, and the Gumbel trick."""

from __future__ import annotations

import torch
from torch import Tensor

LOW32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    raw_BW = _numbers(logits if logits.dtype == torch.float64 else logits.float())
    scores_BW = raw_BW
    if output_counts is not None or prompt_mask is not None:
        counts_BW = torch.zeros_like(raw_BW) if output_counts is None else output_counts.to(raw_BW.dtype)
        scores_BW = _numbers(
            _penalised(raw_BW, counts_BW, prompt_mask, presence_penalty, frequency_penalty, repetition_penalty)
        )
    drawn_B = _drawn(scores_BW, temperature, top_k, top_p, min_p, seed, step)
    ids_B = torch.where(temperature > 0, drawn_B, scores_BW.argmax(-1))
    chosen_B = raw_BW.gather(-1, ids_B[:, None]).squeeze(-1)
    log_probs_B = torch.where(chosen_B.isinf(), chosen_B, chosen_B - raw_BW.logsumexp(-1))
    return ids_B, log_probs_B


def _numbers(x: Tensor) -> Tensor:
    """NaN counts as -inf, and +inf as the largest fp32 number."""
    return x.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def _penalised(
    scores_BW: Tensor,
    counts_BW: Tensor,
    prompt_mask: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    repetition_penalty: Tensor | None,
) -> Tensor:
    in_output_BW = counts_BW > 0
    if repetition_penalty is not None:
        seen_BW = in_output_BW if prompt_mask is None else in_output_BW | prompt_mask
        r_B1 = repetition_penalty[:, None]
        scores_BW = torch.where(seen_BW, torch.where(scores_BW > 0, scores_BW / r_B1, scores_BW * r_B1), scores_BW)
    if frequency_penalty is not None:
        scores_BW = scores_BW - frequency_penalty[:, None] * counts_BW
    if presence_penalty is not None:
        scores_BW = scores_BW - presence_penalty[:, None] * in_output_BW
    return scores_BW


def _drawn(
    scores_BW: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor
) -> Tensor:
    """The token of largest scaled score plus Gumbel noise among those kept: a draw from their softmax."""
    temperature_B1 = torch.where(temperature > 0, temperature, 1.0)[:, None]
    kept_BW = kept(scores_BW, temperature_B1, top_k[:, None], top_p[:, None], min_p[:, None])
    noise_BW = gumbel(seed, step, scores_BW.shape[1])
    perturbed_BW = _scaled(scores_BW, scores_BW.amax(-1, keepdim=True), temperature_B1) + noise_BW
    return torch.where(kept_BW & (scores_BW > -torch.inf), perturbed_BW, -torch.inf).argmax(-1)


def kept(scores_BW: Tensor, temperature_B1: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor) -> Tensor:
    """Mask of the tokens that min-p, top-k and top-p leave, one after the other; ties go to the lowest index."""
    sorted_BW, order_BW = scores_BW.sort(dim=-1, descending=True, stable=True)
    rank_W = torch.arange(scores_BW.shape[1], device=scores_BW.device)
    top_B1 = sorted_BW[:, :1]
    # p >= min_p * max(p), written in logits.
    kept_BW = sorted_BW >= torch.minimum(top_B1 + temperature_B1 * min_p_B1.log(), top_B1)
    kept_BW &= (rank_W < top_k_B1) | (top_k_B1 <= 0)
    probs_BW = _scaled(sorted_BW, top_B1, temperature_B1).exp() * kept_BW
    # A token goes once those before it suffice; the first never does.
    enough_BW = probs_BW.cumsum(-1) - probs_BW >= top_p_B1 * probs_BW.sum(-1, keepdim=True)
    kept_BW &= ~enough_BW | (top_p_B1 >= 1) | (rank_W == 0)
    return torch.zeros_like(kept_BW).scatter(-1, order_BW, kept_BW)


def _scaled(scores_BW: Tensor, top_B1: Tensor, temperature_B1: Tensor) -> Tensor:
    """Differences to the largest stay numbers however small the temperature."""
    return (scores_BW - top_B1.clamp(min=torch.finfo(torch.float32).min)) / temperature_B1


# Random numbers: Philox 4x32-10 (Salmon et al., 2011) --------------------------------------------------------------


def gumbel(seed: Tensor, step: Tensor, num_tokens: int) -> Tensor:
    """Gumbel noise [B, num_tokens] fp64 that depends on seed, step and token alone."""
    uniform_BW = ((random_bits(seed, step, num_tokens).double() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    return -(-torch.log1p(-uniform_BW)).log()


def random_bits(seed: Tensor, step: Tensor, num_tokens: int) -> Tensor:
    """[B, num_tokens] int64 in [0, 2^32): key seed, counter (token // 4, low and high half of step, 0)."""
    block_N = torch.arange((num_tokens + 3) // 4, device=seed.device)
    seed_B1, step_B1 = seed[:, None], step[:, None]
    counter = torch.broadcast_tensors(block_N, step_B1 & LOW32, step_B1 >> 32 & LOW32, torch.zeros_like(step_B1))
    words = philox(counter, (seed_B1 & LOW32, seed_B1 >> 32 & LOW32))
    return torch.stack(words, -1).flatten(1)[:, :num_tokens]


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on 32-bit words held in int64, whose products wrap around without losing a bit of either half."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & LOW32) ^ c1 ^ k0, b & LOW32, (a >> 32 & LOW32) ^ c3 ^ k1, a & LOW32
        k0, k1 = k0 + 0x9E3779B9 & LOW32, k1 + 0xBB67AE85 & LOW32
    return c0, c1, c2, c3
