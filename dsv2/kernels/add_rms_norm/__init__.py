"""The residual stream's sum and the RMSNorm that reads it, in one pass: every pre-norm of DeepSeek-V2 but the first."""

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


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, total): total = x + residual in their dtype, y = rms_norm(total, weight, eps).

    Args:
        x: [..., D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        residual: x's shape and dtype; its rows may be strided differently.
        weight: [D] in x's dtype, on x's device.

    Returns two contiguous tensors of x's shape. The norm reads the rounded total, so y is what rms_norm makes of that.
    Differentiable in x, residual and weight, from the gradient of y, of total, or of both. Raises ValueError where the
    arguments do not match.
    """
    check_shape("residual", residual, *x.shape)
    check_positive("the width of x", x.shape[-1])
    check_shape("weight", weight, x.shape[-1])
    for name, other in (("residual", residual), ("weight", weight)):
        check_same_device(name, other, "x", x)
        check_dtype(name, other, x.dtype)
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        from dsv2.kernels.add_rms_norm.reference import add_rms_norm as run
    else:
        check_dtype("x", x, *FLOATS)
        from dsv2.kernels.add_rms_norm.kernel import add_rms_norm as run
    return run(x, residual, weight, eps)
