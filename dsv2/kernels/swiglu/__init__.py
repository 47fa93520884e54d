"""SiLU(gate) * up, between the projections of every feed-forward layer, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from dsv2.kernels.backend import FLOATS, REFERENCE_FLOATS, check_dtype, check_same_device, check_shape, use_kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, computed in fp32 by the kernel.

    Args:
        gate, up: [T, F], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.

    Returns [T, F]. Differentiable in both. Raises ValueError where the arguments do not match.
    """
    check_shape("gate", gate, None, None)
    check_shape("up", up, *gate.shape)
    check_dtype("up", up, gate.dtype)
    check_same_device("up", up, "gate", gate)
    if not use_kernel(gate):
        check_dtype("gate", gate, *REFERENCE_FLOATS)
        from dsv2.kernels.swiglu.reference import swiglu as run
    else:
        check_dtype("gate", gate, *FLOATS)
        from dsv2.kernels.swiglu.kernel import swiglu as run
    return run(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """The same of [T, 2F] rows, gate before up: one tensor, so that the backward pass writes one. Returns [T, F]."""
    check_shape("gate_up", gate_up, None, None)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected an even number of columns")
    if not use_kernel(gate_up):
        check_dtype("gate_up", gate_up, *REFERENCE_FLOATS)
        from dsv2.kernels.swiglu.reference import swiglu_packed as run
    else:
        check_dtype("gate_up", gate_up, *FLOATS)
        from dsv2.kernels.swiglu.kernel import swiglu_packed as run
    return run(gate_up)
