"""RMSNorm over the last axis (DeepSeek-V2 section 2.1.2 and every pre-norm), computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import check_dtype, check_same_device, check_shape, use_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, cast to x's dtype, times the gain: the order of the official code.

    Args:
        x: [..., D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        weight: [D], on x's device.

    Returns a contiguous tensor of x's shape. Differentiable in x and weight. Raises ValueError where the arguments
    do not match.
    """
    check_shape("weight", weight, x.shape[-1])
    check_same_device("weight", weight, "x", x)
    if not use_kernel(x):
        from dsv2.kernels.rms_norm.reference import rms_norm as run
    else:
        check_dtype("x", x, torch.float32, torch.float16, torch.bfloat16)
        from dsv2.kernels.rms_norm.kernel import rms_norm as run
    return run(x, weight, eps)
