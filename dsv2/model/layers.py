"""RMSNorm and SwiGLU: the two layers that everything else is built around. Norms compute in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.kernels.add_rms_norm import add_rms_norm
from dsv2.kernels.backend import joined
from dsv2.kernels.grouped_mlp import swiglu_mlp
from dsv2.kernels.rms_norm import rms_norm


@torch.no_grad()
def join(first: Tensor, second: Tensor) -> None:
    """Move two matrices of as many columns to one piece of memory, one after the other, so that one product does both.

    The parameters remain what they are, for an optimizer and for a checkpoint.
    """
    if joined(first, second) is None:
        both = torch.cat((first, second))
        first.data, second.data = both.split((len(first), len(second)))


def linear_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """x first^T and x second^T; one product where gradients are not wanted and `join` was called."""
    both = None if torch.is_grad_enabled() else joined(first, second)
    if both is None:
        return F.linear(x, first), F.linear(x, second)
    a, b = F.linear(x, both).split((len(first), len(second)), -1)
    return a, b


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times the gain: the order of the official code, visible in bf16."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and x + delta itself, in one pass; no delta counts as zero."""
        return (self(x), x) if delta is None else add_rms_norm(x, delta, self.weight, self.eps)


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x), without biases."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def join(self) -> None:
        join(self.gate_proj.weight, self.up_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
