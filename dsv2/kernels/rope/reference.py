"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    x_THR = x if x.dtype == torch.float64 else x.float()
    cos_T1R, sin_T1R = cos[:, None], sin[:, None]
    if layout == "interleaved":
        a_THR, b_THR = x_THR[..., 0::2], x_THR[..., 1::2]
    else:
        a_THR, b_THR = x_THR.chunk(2, dim=-1)
    turned = (a_THR * cos_T1R - b_THR * sin_T1R, a_THR * sin_T1R + b_THR * cos_T1R)
    y_THR = torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)
    return y_THR.to(x.dtype)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    x.copy_(rope(x, cos, sin, layout))
