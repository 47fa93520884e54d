"""The rooms under dsv2/kernels, found by walking the package, so that none can be forgotten."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dsv2.kernels
from dsv2.kernels.case import Case, Maker

ROOMS = sorted(m.name for m in pkgutil.iter_modules(dsv2.kernels.__path__) if m.ispkg)


def part(room: str, file: str) -> Any:
    return importlib.import_module(f"dsv2.kernels.{room}.{file}")


def cases() -> list[tuple[str, Case]]:
    return [(room, case) for room in ROOMS for case in part(room, "cases").CASES]


def function(room: str, file: str, case: Case) -> Callable[..., Any]:
    return getattr(part(room, file), case.function or room)


def upcast(x: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Floating-point tensors in fp64, everything else as it is; never shares memory with x."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().to(dtype, copy=True) if x.is_floating_point() else x.clone()


def run(call: Callable[..., Any], inputs: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """Everything that a call tells: outputs by position, mutated arguments, gradients of a fixed random cotangent."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in case.gradients}
    outputs = call(**(inputs | leaves))
    tensors = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs or () if isinstance(x, Tensor)]
    told = {f"output {i}": x.detach() for i, x in enumerate(tensors)}
    told |= {f"{name} after": inputs[name] for name in case.mutated}
    if leaves:
        differentiable = [x for x in tensors if x.requires_grad]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in differentiable]
        grads = torch.autograd.grad(differentiable, list(leaves.values()), cotangents)
        told |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return told


def inputs_of(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    return case.inputs(Maker.seeded(seed, device, dtype))
