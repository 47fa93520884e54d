"""One optimizer step: micro-batches, cross-entropy and balance losses, clipping, statistics.

Knows no files and no schedule.
"""

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
from dsv2.model.balance import balance_losses, devices_per_token, expert_load
from dsv2.model.context import Routing


@dataclass(slots=True)
class StepStats:
    """Figures on the device, read only when somebody logs: reading would wait for the step. L: MoE layers."""

    loss: Tensor
    """Mean cross-entropy, nats a token."""
    grad_norm: Tensor
    balance_losses_L3: Tensor
    """Expert, device and communication loss before alpha; 1 when balanced."""
    expert_load_LE: Tensor
    """Share of routed rows by expert."""
    devices_per_token_L: Tensor
    """Mean number of devices that a token is sent to."""


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    train: TrainConfig,
    lr: float,
) -> StepStats:
    """Accumulate gradients over the micro-batches and update once.

    The loss is the mean over the valid targets of the whole batch, and the balance losses, which are added up over
    the layers, the mean over its sequences, so a step does not depend on how the batch was cut.
    """
    num_targets = sum(int((b.targets != IGNORED).sum()) for b in micro_batches)
    limit = model.cfg.moe.device_limit if model.cfg.moe else (1, 1)
    told: list[list[Tensor]] = []
    for batch in micro_batches:
        ce_sum, routings = _forward(model, batch)
        ce = ce_sum / max(num_targets, 1)
        balance_L3, *others = _layer_figures(routings, len(batch.sequence_ids), limit, model.device)
        balance = sum(alpha * x for alpha, x in zip(train.balance_alphas, balance_L3.sum(0), strict=True))
        (ce + balance / len(micro_batches)).backward()
        told.append([ce.detach(), balance_L3.detach(), *others])
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ce, *layers = (torch.stack(of_batches) for of_batches in zip(*told, strict=True))
    return StepStats(ce.sum(), grad_norm, *(x.mean(0) for x in layers))


def _forward(model: Transformer, batch: Batch) -> tuple[Tensor, list[Routing]]:
    """Cross-entropy summed over the targets, and what every MoE layer decided."""
    tokens_T, targets_T = (torch.from_numpy(x).to(model.device) for x in (batch.tokens, batch.targets))
    context = Context.packed(batch.cu_seqlens.tolist(), model.device)
    context.routings = []
    hidden_TD = model.model(tokens_T, context)
    return cross_entropy(hidden_TD, model.head_weight, targets_T, ignore_index=IGNORED), context.routings


def _layer_figures(
    routings: Sequence[Routing], num_sequences: int, limit: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Balance losses [L, 3], expert load [L, E], devices a token [L]."""
    if not routings:
        return [torch.zeros(0, *shape, device=device) for shape in ((3,), (0,), ())]
    layers = [
        (balance_losses(r, num_sequences, *limit), expert_load(r), devices_per_token(r, limit[0])) for r in routings
    ]
    return [torch.stack(of_layers) for of_layers in zip(*layers, strict=True)]


def max_violation(expert_load_LE: Tensor | np.ndarray) -> float:
    """Load of the busiest expert over the mean, minus 1, worst layer; 0 when balanced (or without experts)."""
    load = np.asarray(expert_load_LE)
    return float((load.max(1) * load.shape[1]).max() - 1) if load.size else 0.0
