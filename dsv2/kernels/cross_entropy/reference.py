"""The language-model head and its cross-entropy in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    counted_T = targets != ignore_index
    # Any id stands in for an ignored target, and zeros for its row, which may hold NaN: what they give is dropped.
    hidden = hidden.masked_fill(~counted_T[:, None], 0)
    log_probs_T = token_log_probs(hidden, weight, torch.where(counted_T, targets, 0))
    return -torch.where(counted_T, log_probs_T, 0.0).sum()


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits_TW = hidden @ weight.T
    if logits_TW.dtype != torch.float64:
        logits_TW = logits_TW.float()
    return logits_TW.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
