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
from dsv2.device import to_device
from dsv2.kernels.cross_entropy import cross_entropy
from dsv2.model import Context, Transformer
from dsv2.model.balance import balance_losses, devices_per_token, expert_load
from dsv2.model.context import Dropping, Routing
from dsv2.model.dropping import drop_rate


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
    """Mean number of devices that a token chose to be sent to."""
    drop_rate_L: Tensor
    """Share of the routed rows that were dropped."""


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    train: TrainConfig,
    lr: float,
) -> StepStats:
    """Accumulate gradients over the micro-batches and update once.

    The loss is the mean over the valid targets of the whole batch, and the balance losses, which are added up over
    the layers, the mean over its sequences, so neither depends on how the batch was cut. Rows are dropped within a
    micro-batch: devices have no more than that to compute at once.
    """
    num_targets = sum(int((b.targets != IGNORED).sum()) for b in micro_batches)
    limit = model.cfg.moe.device_limit if model.cfg.moe else (1, 1)
    told: list[list[Tensor]] = []
    for batch in micro_batches:
        ce_sum, routings = _forward(model, batch, _dropping(batch, train, limit[0], model.device))
        ce = ce_sum / max(num_targets, 1)
        balance_L3, *others = _layer_figures(routings, len(batch.sequence_ids), limit, model.device)
        # Without experts there are no losses to zip with.
        losses = zip(train.balance_alphas, balance_L3.unbind(-1), strict=bool(routings))
        balance = sum(alpha * loss_L.sum() for alpha, loss_L in losses)
        (ce + balance / len(micro_batches)).backward()
        told.append([ce.detach(), balance_L3.detach(), *others])
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ce, *layers = (torch.stack(of_batches) for of_batches in zip(*told, strict=True))
    return StepStats(ce.sum(), grad_norm, *(x.mean(0) for x in layers))


def exempt_sequences(sequence_ids: np.ndarray, share: float) -> np.ndarray:
    """Which sequences are never dropped from, [B] bool: about `share` of all ids, by a hash that nothing else enters.

    So they are the same in every epoch, after a resume and on any number of ranks. splitmix64's mixing of the id.
    """
    x = sequence_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # The upper 53 bits, as a number in [0, 1).
    return (x >> np.uint64(11)) * 2.0**-53 < share


def _dropping(batch: Batch, train: TrainConfig, num_groups: int, device: torch.device) -> Dropping | None:
    """None where nothing can be dropped: no device has more than all rows, which are `num_groups` mean loads."""
    if train.capacity_factor >= num_groups:
        return None
    exempt_B = exempt_sequences(batch.sequence_ids, train.exempt_share)
    exempt_T = exempt_B.repeat(len(batch.tokens) // len(exempt_B))
    return Dropping(train.capacity_factor, to_device(exempt_T, device))


def _forward(model: Transformer, batch: Batch, dropping: Dropping | None) -> tuple[Tensor, list[Routing]]:
    """Cross-entropy summed over the targets, and what every MoE layer decided."""
    tokens_T, targets_T = (torch.from_numpy(x).to(model.device) for x in (batch.tokens, batch.targets))
    context = Context.packed(batch.cu_seqlens.tolist(), model.device)
    context.routings, context.dropping = [], dropping
    hidden_TD = model.model(tokens_T, context)
    return cross_entropy(hidden_TD, model.head_weight, targets_T, ignore_index=IGNORED), context.routings


def _layer_figures(
    routings: Sequence[Routing], num_sequences: int, limit: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Balance losses [L, 3], expert load [L, E], devices a token [L], drop rate [L]; all empty without experts."""
    if not routings:
        return [torch.zeros(0, device=device)] * 4
    layers = [
        (balance_losses(r, num_sequences, *limit), expert_load(r), devices_per_token(r, limit[0]), drop_rate(r))
        for r in routings
    ]
    return [torch.stack(of_layers) for of_layers in zip(*layers, strict=True)]


def max_over_mean(expert_load_LE: Tensor) -> Tensor:
    """Load of the busiest expert over the mean, by layer, [L]; 1 when balanced."""
    return expert_load_LE.amax(1) / expert_load_LE.mean(1)
