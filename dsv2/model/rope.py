"""Angles of the rotary embedding and their YaRN extension (DeepSeek-V2 sections 2.1.3 and 3.1.4).

`kernels.rope` turns by them. The softmax factor of YaRN is not here: it scales whole logits, and belongs to the
attention that applies it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dsv2.config import RopeConfig, YarnConfig


@functools.lru_cache(maxsize=16)
def inverse_frequencies(rope: RopeConfig, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2i/dim) for i < dim/2, stretched by YaRN where it applies. [dim/2] fp32, radians a token."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    periods = rope.theta**exponents
    if rope.yarn is None:
        return 1.0 / periods
    ramp = _yarn_ramp(rope.yarn, rope.theta, dim, device)
    return (1.0 / periods) * (1.0 - ramp) + (1.0 / (rope.yarn.factor * periods)) * ramp


def _yarn_ramp(yarn: YarnConfig, theta: float, dim: int, device: torch.device | str) -> Tensor:
    """0 for frequencies that turn often enough to be kept, 1 for those to be interpolated. [dim/2]."""

    def channel(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / width).clamp(0, 1)


def rotary_tables(rope: RopeConfig, dim: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency, times the rotary ratio: two [T, dim/2] fp32."""
    angles = positions_T.float()[:, None] * inverse_frequencies(rope, dim, positions_T.device)
    return angles.cos() * rope.rotary_ratio, angles.sin() * rope.rotary_ratio
