"""RMSNorm and SwiGLU: the two layers that everything else is built around. Norms compute in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2.kernels.add_rms_norm import add_rms_norm
from dsv2.kernels.grouped_mlp import swiglu_mlp
from dsv2.kernels.rms_norm import rms_norm


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

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
