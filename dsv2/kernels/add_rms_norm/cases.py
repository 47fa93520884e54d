"""Inputs for add_rms_norm: official widths, odd ones, rows that are views of different strides, one row, none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker

GRADIENTS = ("x", "residual", "weight")


def _inputs(T: int, D: int) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        x, residual = maker.normal(T, D), maker.normal(T, D, std=3.0)
        return {"x": x, "residual": residual, "weight": maker.normal(D, std=0.1, mean=1.0), "eps": 1e-6}

    return make


def _views(maker: Maker) -> dict[str, Any]:
    """Between NaN on both sides, in rows of different lengths."""
    x, residual = maker.normal(5, 48), maker.normal(5, 2, 80)
    x[:, 36:], residual[:, 1], residual[:, 0, :40] = float("nan"), float("nan"), float("nan")
    residual[:, 0, 76:] = float("nan")
    weight = maker.normal(36, std=0.1, mean=1.0)
    return {"x": x[:, :36], "residual": residual[:, 0, 40:76], "weight": weight, "eps": 1e-6}


def _three_axes(maker: Maker) -> dict[str, Any]:
    """Of which the first two do not fold into one stride, and with channels that lie apart."""
    x, residual = maker.normal(2, 3, 20).transpose(0, 1), maker.normal(3, 20, 2).transpose(1, 2)
    return {"x": x, "residual": residual, "weight": maker.normal(20, std=0.1, mean=1.0), "eps": 1e-6}


def _cancelling(maker: Maker) -> dict[str, Any]:
    """A row that adds up to nothing, which eps alone keeps finite."""
    inputs = _inputs(3, 64)(maker)
    inputs["residual"][1] = -inputs["x"][1]
    return inputs | {"eps": 1e-2}


CASES = (
    *(
        Case(name=f"T{T}-D{D}", inputs=_inputs(T, D), gradients=GRADIENTS)
        for T, D in ((1, 512), (7, 192), (65, 100), (3, 2048), (2, 1), (5, 513))
    ),
    Case(name="views", inputs=_views, gradients=GRADIENTS),
    Case(name="three-axes", inputs=_three_axes, gradients=GRADIENTS),
    Case(name="cancelling", inputs=_cancelling, gradients=GRADIENTS),
    Case(name="empty", inputs=_inputs(0, 64), gradients=GRADIENTS),
)


def _torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total


def _benchmark(T: int, D: int, backward: bool = False) -> Benchmark:
    def make(device: torch.device) -> dict[str, Any]:
        x, residual = (torch.randn(T, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        return {"x": x, "residual": residual, "weight": torch.ones_like(x[0]), "eps": 1e-6}

    return Benchmark(
        name=f"T{T}-D{D}{'-backward' if backward else ''}",
        inputs=make,
        flops=(14.0 if backward else 5.0) * T * D,
        # Forward: two read, two written; backward: the total and two gradients read, one written.
        bytes=2.0 * T * D * (8 if backward else 4),
        gradients=GRADIENTS,
        backward=backward,
        baselines={"torch": _torch},
    )


BENCHMARKS = (
    _benchmark(16384, 2048),
    _benchmark(16384, 2048, backward=True),
    _benchmark(8192, 5120),
    _benchmark(8192, 5120, backward=True),
    _benchmark(1, 2048),
    _benchmark(64, 2048),
    _benchmark(512, 5120),
)
