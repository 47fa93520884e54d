"""Inputs for the head's loss: odd widths, one word, ignored targets, views, saturated softmaxes, no tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker

IGNORED = -100


def _inputs(T: int, D: int, W: int, std: float = 0.3) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        return {
            "hidden": maker.normal(T, D),
            "weight": maker.normal(W, D, std=std),
            "targets": maker.integers(0, W, T),
        }

    return make


def _ignoring(ignore_index: int, every: int) -> Inputs:
    """Every so many targets are ignored."""

    def make(maker: Maker) -> dict[str, Any]:
        inputs = _inputs(13, 24, 97)(maker)
        inputs["targets"][::every] = ignore_index
        return inputs | {"ignore_index": ignore_index}

    return make


def _broken(maker: Maker) -> dict[str, Any]:
    """What is ignored holds NaN and infinities."""
    inputs = _ignoring(IGNORED, 3)(maker)
    inputs["hidden"][0], inputs["hidden"][3, 5], inputs["hidden"][6] = float("nan"), float("inf"), float("-inf")
    return inputs


def _views(maker: Maker) -> dict[str, Any]:
    """Rows inside wider rows, a weight by columns, and every other target."""
    return {
        "hidden": maker.normal(9, 48)[:, :32],
        "weight": maker.normal(32, 65, std=0.3).t(),
        "targets": maker.integers(0, 65, 18)[::2],
    }


BOTH = ("hidden", "weight")
ONLY_FP32 = (torch.float32,)

CASES = (
    *(
        Case(name=f"T{T}-D{D}-W{W}", function=function, inputs=_inputs(T, D, W), gradients=BOTH)
        for function in ("cross_entropy", "token_log_probs")
        for T, D, W in ((1, 8, 64), (7, 16, 97), (65, 24, 1000), (3, 16, 1), (0, 16, 97))
    ),
    *(
        Case(name="views", function=function, inputs=_views, gradients=BOTH)
        for function in ("cross_entropy", "token_log_probs")
    ),
    # Logits of some hundreds: in 16 bits their rounding alone is more than a gradient may be off.
    *(
        Case(
            name="saturated",
            function=function,
            inputs=_inputs(9, 64, 130, std=30.0),
            gradients=BOTH,
            dtypes=ONLY_FP32,
            gpu_dtypes=ONLY_FP32,
        )
        for function in ("cross_entropy", "token_log_probs")
    ),
    Case(name="some-ignored", inputs=_ignoring(IGNORED, 3), gradients=BOTH),
    Case(name="broken-where-ignored", inputs=_broken, gradients=BOTH),
    Case(name="all-ignored", inputs=_ignoring(IGNORED, 1), gradients=BOTH),
    Case(name="ignoring-a-word", inputs=_ignoring(5, 4), gradients=BOTH),
    Case(name="frozen-weight", inputs=_inputs(5, 16, 97), gradients=("hidden",)),
    Case(name="frozen-hidden", inputs=_inputs(5, 16, 97), gradients=("weight",)),
    Case(name="no-gradients", inputs=_inputs(5, 16, 97)),
    Case(name="frozen-weight", function="token_log_probs", inputs=_inputs(5, 16, 97), gradients=("hidden",)),
)


def _whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def _whole_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def _benchmark(T: int, D: int, W: int, function: str = "cross_entropy", backward: bool = True) -> Benchmark:
    """Work: three products, one more where the backward pass needs the logits again, one without a backward pass.

    Bytes: operands and gradients once; logits, which a chunk need not send to memory, are not counted.
    """

    def make(device: torch.device) -> dict[str, Any]:
        return {
            "hidden": torch.randn(T, D, device=device, dtype=torch.bfloat16),
            "weight": torch.randn(W, D, device=device, dtype=torch.bfloat16) * 0.02,
            "targets": torch.randint(W, (T,), device=device),
        }

    products = (4 if function == "token_log_probs" else 3) if backward else 1
    return Benchmark(
        name=f"T{T}-D{D}-W{W}{'-backward' if backward else ''}",
        function=function,
        inputs=make,
        flops=2.0 * products * T * D * W,
        bytes=2.0 * (T * D + W * D) * (2 if backward else 1) + 8.0 * T,
        gradients=BOTH,
        backward=backward,
        baselines={"torch": _whole_loss if function == "cross_entropy" else _whole_log_probs},
    )


BENCHMARKS = (
    _benchmark(16384, 2048, 102400),
    _benchmark(8192, 5120, 102400),
    _benchmark(16384, 2048, 102400, backward=False),
    _benchmark(16384, 2048, 102400, function="token_log_probs"),
)
