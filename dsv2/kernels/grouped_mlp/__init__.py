"""The routed experts of DeepSeekMoE (DeepSeek-V2 equation 20): sort, gate and up projection, SwiGLU, down, combine."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
from dsv2.kernels.route import ROUTE_BLOCK


def grouped_mlp(
    x: Tensor,
    experts: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    addend: Tensor | Callable[[], Tensor] | None = None,
    block_counts: Tensor | None = None,
) -> Tensor:
    """addend[t] + sum over a of gates[t, a] * W_down (SiLU(W_gate x[t]) * W_up x[t]), by the matrices of experts[t, a].

    Args:
        x: [T, D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        experts: [T, A] int64, each in [0, E).
        gates: [T, A] float32 (float64 in the reference).
        gate_up: [E, 2F, D], gate rows before up rows, contiguous; D and F multiples of 8.
        down: [E, D, F], contiguous. For the kernel both begin at multiples of 16 bytes.
        addend: [T, D], the output of the shared experts; or what gives it, called when all else has been launched, for
            those that run beside this.
        block_counts: what `route` counted of these experts, which saves counting again.

    Returns [T, D], combined in fp32 and rounded once. Differentiable in x, gates, gate_up, down and addend. No token is
    dropped or padded, and the host never waits for the device. Raises ValueError where the arguments do not match.
    """
    _check(x, experts, gates, gate_up, down, None if callable(addend) else addend)
    if block_counts is not None:
        check_shape("block_counts", block_counts, -(-len(experts) // ROUTE_BLOCK), len(down))
        check_dtype("block_counts", block_counts, torch.int32)
        check_same_device("block_counts", block_counts, "x", x)
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        check_dtype("gates", gates, torch.float32, torch.float64)
        from dsv2.kernels.grouped_mlp.reference import grouped_mlp as reference

        given = addend if addend is None or isinstance(addend, Tensor) else addend()
        return reference(x, experts, gates, gate_up, down, given, block_counts)
    check_dtype("x", x, *FLOATS)
    check_dtype("gates", gates, torch.float32)
    from dsv2.kernels.grouped_mlp.kernel import grouped_mlp as kernel

    return kernel(x, experts, gates, gate_up, down, addend, block_counts)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W_down (SiLU(W_gate x) * W_up x): a dense feed-forward layer, or the shared experts, which are one.

    Args:
        x: [T, D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        gate, up: [F, D], contiguous; D and F multiples of 8.
        down: [D, F], contiguous. For the kernel all three begin at multiples of 16 bytes.

    Returns [T, D]. Differentiable in all. Raises ValueError where the arguments do not match.
    """
    check_shape("x", x, None, None)
    check_shape("gate", gate, None, x.shape[1])
    check_shape("up", up, *gate.shape)
    check_shape("down", down, x.shape[1], len(gate))
    _check_widths(x, len(gate))
    for name, tensor in {"gate": gate, "up": up, "down": down}.items():
        check_dtype(name, tensor, x.dtype)
        check_same_device(name, tensor, "x", x)
        _check_contiguous(name, tensor)
    if not use_kernel(x):
        check_dtype("x", x, *REFERENCE_FLOATS)
        from dsv2.kernels.grouped_mlp.reference import swiglu_mlp as run
    else:
        check_dtype("x", x, *FLOATS)
        from dsv2.kernels.grouped_mlp.kernel import swiglu_mlp as run
    return run(x, gate, up, down)


def _check(x: Tensor, experts: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, addend: Tensor | None) -> None:
    check_shape("x", x, None, None)
    check_shape("experts", experts, len(x), None)
    check_dtype("experts", experts, torch.int64)
    check_positive("the width of experts", experts.shape[1])
    check_shape("gates", gates, *experts.shape)
    check_shape("down", down, None, x.shape[1], None)
    E, D, F = down.shape
    check_positive("the number of matrices in down", E)
    check_shape("gate_up", gate_up, E, 2 * F, D)
    _check_widths(x, F)
    tensors = {"gate_up": gate_up, "down": down} | ({} if addend is None else {"addend": addend})
    for name, tensor in tensors.items():
        check_dtype(name, tensor, x.dtype)
        if name != "addend":
            _check_contiguous(name, tensor)
    if addend is not None:
        check_shape("addend", addend, *x.shape)
    for name, tensor in ({"experts": experts, "gates": gates} | tensors).items():
        check_same_device(name, tensor, "x", x)


def _check_widths(x: Tensor, F: int) -> None:
    """Grouped products and bulk copies want rows of whole 16 bytes."""
    D = x.shape[1]
    if D % 8 or F % 8 or D == 0 or F == 0:
        raise ValueError(f"x has D={D} channels and down F={F}: both must be multiples of 8, and not 0")


def _check_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}, expected contiguous")
