"""One optimizer step: micro-batches, the two losses, clipping, statistics. Knows no files and no schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv2.config.run import TrainConfig
from dsv2.data.batches import IGNORED, Batch
from dsv2.kernels.cross_entropy import cross_entropy
from dsv2.model import Context, Transformer
from dsv2.model.balance import expert_balance_loss, expert_load


@dataclass(slots=True)
class StepStats:
    """Scalars on the device, read only when somebody logs: reading would wait for the step."""

    loss: Tensor
    """Mean cross-entropy, nats a token."""
    balance_loss: Tensor
    """Sum over MoE layers of f.P, before alpha; as many as there are layers when balanced."""
    grad_norm: Tensor
    expert_load_LE: Tensor
    """Share of routed rows by MoE layer and expert."""


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    train: TrainConfig,
    lr: float,
) -> StepStats:
    """Accumulate gradients over the micro-batches and update once.

    The loss is the mean over the valid targets of the whole batch, and the balance loss the mean over its sequences,
    so a step does not depend on how the batch was cut.
    """
    device = model.device
    num_targets = sum(int((b.targets != IGNORED).sum()) for b in micro_batches)
    loss, balance, load = (torch.zeros((), device=device) for _ in range(3))
    for batch in micro_batches:
        share = 1 / len(micro_batches)
        tokens_T, targets_T = (torch.from_numpy(x).to(device) for x in (batch.tokens, batch.targets))
        context = Context.packed(batch.cu_seqlens.tolist(), device)
        context.routings = []
        hidden_TD = model.model(tokens_T, context)
        ce_sum = cross_entropy(hidden_TD, model.head_weight, targets_T, ignore_index=IGNORED)
        ce = ce_sum / max(num_targets, 1)
        num_sequences = len(batch.sequence_ids)
        aux = [expert_balance_loss(r, num_sequences) * share for r in context.routings]
        aux_sum = torch.stack(aux).sum() if aux else torch.zeros((), device=device)
        (ce + train.expert_balance_alpha * aux_sum).backward()
        loss, balance = loss + ce.detach(), balance + aux_sum.detach()
        load = load + _loads(context, device) * share
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepStats(loss, balance, grad_norm, load)


def _loads(context: Context, device: torch.device) -> Tensor:
    routings = context.routings or []
    return torch.stack([expert_load(r) for r in routings]) if routings else torch.zeros(0, 0, device=device)


def max_violation(expert_load_LE: Tensor | np.ndarray) -> float:
    """Load of the busiest expert over the mean, minus 1, worst layer; 0 when balanced (or without experts)."""
    load = np.asarray(expert_load_LE)
    return float((load.max(1) * load.shape[1]).max() - 1) if load.size else 0.0
