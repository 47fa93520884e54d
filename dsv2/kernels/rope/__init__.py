"""Rotary position embedding (DeepSeek-V2 section 2.1.3): pairs of channels turned by the position, computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import FLOATS, REFERENCE_FLOATS, check_dtype, check_same_device, check_shape, use_kernel

LAYOUTS = ("interleaved", "half")


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Every pair (a, b) of channels becomes (a cos - b sin, a sin + b cos), in fp32; the dtype is kept.

    `interleaved` pairs channels (2i, 2i + 1), `half` pairs (i, i + R/2).
    NOTE: official DeepSeek-V2 weights are interleaved; rotating them as halves is silently wrong.

    Args:
        x: [T, H, R], float32, float16 or bfloat16 (float64 in the reference); rows and heads may be strided.
        cos, sin: [T, R/2] float32, by row and pair; they may carry a factor.

    Returns a contiguous tensor of x's shape. Differentiable in x alone; the backward applies the transpose, so a factor
    stays. Raises ValueError where the arguments do not match.
    """
    if _goes_to_kernel(x, cos, sin, layout):
        from dsv2.kernels.rope.kernel import rope as run
    else:
        from dsv2.kernels.rope.reference import rope as run
    return run(x, cos, sin, layout)


@torch.no_grad()
def rope_(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    """`rope`, written over x, whose channels must lie side by side. Not differentiable."""
    is_for_kernel = _goes_to_kernel(x, cos, sin, layout)
    if x.stride(-1) != 1:
        raise ValueError(f"x has strides {x.stride()}, expected channels side by side")
    if is_for_kernel:
        from dsv2.kernels.rope.kernel import rope_ as run
    else:
        from dsv2.kernels.rope.reference import rope_ as run
    run(x, cos, sin, layout)


def _goes_to_kernel(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> bool:
    """Whether the kernel runs. ValueError where it, or else the reference, cannot take these."""
    check_shape("x", x, None, None, None)
    check_tables(cos, sin, layout, "x", x, num_channels=x.shape[-1])
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        return False
    check_dtype("x", x, *FLOATS)
    check_dtype("cos", cos, torch.float32)
    check_dtype("sin", sin, torch.float32)
    return True


def check_tables(cos: Tensor, sin: Tensor, layout: str, name: str, x: Tensor, num_channels: int) -> None:
    """Whether they fit the rows and the device of x, called `name`, which has `num_channels` to be rotated."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be 'interleaved' or 'half'")
    if num_channels < 2 or num_channels % 2:
        raise ValueError(f"{name} has {num_channels} rotary channels, expected pairs")
    for table_name, table in (("cos", cos), ("sin", sin)):
        check_shape(table_name, table, x.shape[0], num_channels // 2)
        check_dtype(table_name, table, torch.float32, torch.float64)
        check_same_device(table_name, table, name, x)
