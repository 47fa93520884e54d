"""Which implementation a room runs, and the checks that all rooms share. The only switch of the package."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (9, 0)
"""Bulk copies, and 227 KB of shared memory a block: several kernels do not fit the 163 KB of an 8.0."""

HOPPER = (9, 0)
"""Where kernels written for warp-group matrix instructions and the bulk copy engine run: exactly this capability."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What most kernels take."""

REFERENCE_FLOATS = (*FLOATS, torch.float64)

log = logging.getLogger("dsv2.kernels")


def use_kernel(x: Tensor) -> bool:
    """Whether a tensor like x goes to the kernel (a GPU that can run it) or to the reference (everything else).

    The environment variable DSV2_KERNELS=reference sends everything to the reference.
    """
    if x.device.type != "cuda":
        return False
    choice = os.environ.get("DSV2_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"DSV2_KERNELS={choice!r} must be 'auto' or 'reference'")
    return choice == "auto" and is_supported(x.device)


@functools.cache
def is_supported(device: torch.device) -> bool:
    """Whether the GPU is new enough; where it is not, one line says so, once."""
    found = capability(device)
    if found >= MINIMUM_CAPABILITY:
        return True
    log.warning(
        "%s has compute capability %d.%d; dsv2's kernels need %d.%d, so the reference implementations run",
        torch.cuda.get_device_name(device),
        *found,
        *MINIMUM_CAPABILITY,
    )
    return False


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and capability(device) == HOPPER


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of an interpreted run: few, so that a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def early_launch(x: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin while the one before it ends, which saves the gap between the two.

    Its kernel takes PDL, and where that is true waits (`gdc_wait`) before it touches what other launches write or read.
    """
    return {"PDL": True, "launch_pdl": True} if is_hopper(x.device) else {"PDL": False}


class KernelOp:
    """An operator of torch, `op`, around a `body` that launches kernels.

    In inference mode nobody but the body looks at a call, unless it is traced, and torch's way to the body takes longer
    than a small kernel.
    """

    def __init__(self, op: Any, body: Callable[..., Any]) -> None:
        self.op, self._body = op, body
        self.register_fake, self.register_autograd = op.register_fake, op.register_autograd

    def __call__(self, *args: Any, **named: Any) -> Any:
        is_untouched = torch.is_inference_mode_enabled() and not _is_traced()
        return (self._body if is_untouched else self.op)(*args, **named)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def kernel_op(name: str, *, mutates_args: str | Iterable[str] = ()) -> Callable[[Callable[..., Any]], KernelOp]:
    """`torch.library.custom_op` of a function that launches kernels, on the device of its first argument, a tensor."""

    def register(body: Callable[..., Any]) -> KernelOp:
        body = on_its_device(body)
        return KernelOp(torch.library.custom_op(name, body, mutates_args=mutates_args), body)

    return register


def on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, wherever tensors are. To ask which that is costs less than to set it."""

    @functools.wraps(body)
    def run(x: Tensor, *others: Any, **named: Any) -> Any:
        device = x.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return body(x, *others, **named)
        with torch.cuda.device(device):
            return body(x, *others, **named)

    return run


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} is {str(x.dtype).removeprefix('torch.')}, expected {expected}")


def check_shape(name: str, x: Tensor, *expected: int | None) -> None:
    """`None` stands for any size."""
    if x.dim() != len(expected) or any(e is not None and e != s for s, e in zip(x.shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({wanted})")


def check_positive(what: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{what} is {size}, expected at least 1")


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: expected one device")


def check_aligned(name: str, x: Tensor) -> None:
    """What the bulk copy engine reads begins at 16 bytes. Asked inside of operators: tensors of a trace lie nowhere."""
    if x.data_ptr() % 16:
        raise ValueError(f"{name} begins {x.data_ptr() % 16} bytes past a multiple of 16, expected at one")


def unit_stride(x: Tensor) -> Tensor:
    """What kernels read along the last axis without a stride; a copy only where a view cannot give it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def joined(first: Tensor, second: Tensor) -> Tensor | None:
    """Two matrices of as many columns as one, where they lie one after the other in one piece of memory."""
    is_adjacent = (
        first.is_contiguous()
        and second.is_contiguous()
        and first.shape[1] == second.shape[1]
        and second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )
    return first.as_strided((len(first) + len(second), first.shape[1]), first.stride()) if is_adjacent else None
