"""RMSNorm over the last axis (DeepSeek-V2 section 2.1.2 and every pre-norm), computed in fp32."""

from __future__ import annotations

from torch import Tensor

from dsv2.kernels.backend import (
    FLOATS,
    REFERENCE_FLOATS,
    check_dtype,
    check_positive,
    check_same_device,
    check_shape,
    use_kernel,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, cast to x's dtype, times the gain: the order of the official code.

    Args:
        x: [..., D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        weight: [D] in x's dtype, on x's device.

    Returns a contiguous tensor of x's shape. Differentiable in x and weight. Raises ValueError where the arguments
    do not match.
    """
    check_positive("the width of x", x.shape[-1])
    check_shape("weight", weight, x.shape[-1])
    check_same_device("weight", weight, "x", x)
    check_dtype("weight", weight, x.dtype)
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        from dsv2.kernels.rms_norm.reference import rms_norm as run
    else:
        check_dtype("x", x, *FLOATS)
        from dsv2.kernels.rms_norm.kernel import rms_norm as run
    return run(x, weight, eps)
