"""AdamW, with decay on matrices only, and its state by parameter name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2.config.run import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Decay on every matrix, embeddings included, none on gains and biases (the paper does not say; our choice)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.adam_eps, fused=True)


def state_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Both moments and the step count of every parameter, named `moment/parameter`."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        out |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS}
        out[f"step/{name}"] = state["step"].reshape(1)
    return out


def load_state_tensors(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Inverse of `state_tensors`. Raises ValueError where a tensor is missing or of another shape."""
    for name, p in model.named_parameters():
        for kind, shape in ((_MOMENTS[0], p.shape), (_MOMENTS[1], p.shape), ("step", (1,))):
            found = tensors.get(f"{kind}/{name}")
            if found is None or found.shape != shape:
                got = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise ValueError(f"optimizer state: {kind}/{name} {got}, expected shape {tuple(shape)}")
        state = {m: tensors[f"{m}/{name}"].to(p.device, copy=True) for m in _MOMENTS}
        optimizer.state[p] = state | {"step": tensors[f"step/{name}"].reshape(()).to(p.device, copy=True)}
