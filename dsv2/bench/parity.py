"""The gate before any time is reported: a room's public function against its reference in a wider dtype.

The budgets are those of bf16, the dtype that benchmarks run in; integers must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv2.kernels.case import Benchmark

BUDGET = 1e-2
GRADIENT_BUDGET = 5e-2

_CHUNK = 2**24
"""Elements compared at a time, so that the comparison takes little memory beside large outputs."""


@dataclass(frozen=True, slots=True)
class Parity:
    """`verdict` is `ok`, `WRONG`, or `skipped: too large` where the reference does not fit the GPU.

    `errors` by output: the relative norm of the error, of integers the share that differs; infinite where shapes or
    the places of NaN differ, or where one side has no such output.
    """

    verdict: str
    errors: dict[str, float] = field(default_factory=dict)


def check_parity(
    benchmark: Benchmark,
    inputs: Mapping[str, Any],
    function: Callable[..., Any],
    reference: Callable[..., Any],
    wide: torch.dtype = torch.float32,
) -> Parity:
    """Compare outputs, mutated arguments and, of backward benchmarks, gradients; the reference runs in `wide`.

    The function runs on `inputs` themselves, so it writes to the mutated ones. ValueError where there is nothing to
    compare.
    """
    try:
        expected = outcome(benchmark, {name: _upcast(x, wide) for name, x in inputs.items()}, reference)
        actual = outcome(benchmark, inputs, function)
        errors = {what: _error(actual.get(what), expected.get(what)) for what in {**expected, **actual}}
    except torch.OutOfMemoryError:
        return Parity("skipped: too large")
    if not expected:
        raise ValueError(
            "nothing to compare: the reference returns no tensor and the benchmark names none in `mutated`"
        )
    wrong = any(not error <= _budget(what, expected.get(what)) for what, error in errors.items())
    return Parity("WRONG" if wrong else "ok", errors)


def outcome(benchmark: Benchmark, inputs: Mapping[str, Any], call: Callable[..., Any]) -> dict[str, Tensor]:
    """Everything that a call tells: outputs by position, mutated arguments, gradients of fixed random cotangents."""
    leaves = leaves_of(benchmark, inputs)
    with torch.set_grad_enabled(bool(leaves)):
        outputs = tensors(call(**{**inputs, **leaves}))
    told = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    told |= {f"{name} after": inputs[name] for name in benchmark.mutated}
    if leaves:
        roots = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(roots, list(leaves.values()), cotangents(roots))
        told |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return told


def leaves_of(benchmark: Benchmark, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments to differentiate by; none unless the benchmark has a backward pass."""
    names = benchmark.gradients if benchmark.backward else ()
    return {name: inputs[name].detach().requires_grad_() for name in names}


def tensors(returned: Any) -> list[Tensor]:
    """What a function returned, without what is no tensor."""
    if isinstance(returned, Tensor):
        return [returned]
    return [x for x in returned or () if isinstance(x, Tensor)]


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Random, the same for the same shapes, and exact in every dtype that holds bf16."""
    drawn = []
    for i, x in enumerate(outputs):
        # Not a seed that inputs are drawn by: a norm's gradient all but vanishes where the cotangent is its input.
        generator = torch.Generator(x.device).manual_seed(1000 + i)
        c = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.bfloat16)
        drawn.append(c.to(x.dtype))
    return drawn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, or ||actual|| where all of `expected` is zero.

    Infinite where shapes, or the places of NaN and infinities, differ.
    """
    if actual.shape != expected.shape:
        return math.inf
    square_error = square_norm = 0.0
    for a, e in zip(actual.flatten().split(_CHUNK), expected.flatten().split(_CHUNK), strict=True):
        a, e = a.double(), e.double()
        odd = ~e.isfinite()
        if not torch.equal(odd, ~a.isfinite()) or not torch.equal(a[odd].nan_to_num(), e[odd].nan_to_num()):
            return math.inf
        square_error += (a - e)[~odd].square().sum().item()
        square_norm += e[~odd].square().sum().item()
    return math.sqrt(square_error / square_norm if square_norm else square_error)


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None or actual.shape != expected.shape:
        return math.inf
    if expected.is_floating_point():
        return relative_error(actual, expected)
    return (actual != expected).double().mean().item() if expected.numel() else 0.0


def _budget(what: str, expected: Tensor | None) -> float:
    if expected is None or not expected.is_floating_point():
        return 0.0
    return GRADIENT_BUDGET if what.startswith("gradient") else BUDGET


def _upcast(x: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, everything else as it is; never shares memory with x."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().to(dtype, copy=True) if x.is_floating_point() else x.clone()
