"""Inputs for rms_norm: official widths, odd ones, rows that are views, one row, none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker


def _inputs(T: int, D: int) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        return {"x": maker.normal(T, D), "weight": maker.normal(D, std=0.1, mean=1.0), "eps": 1e-6}

    return make


def _view(maker: Maker) -> dict[str, Any]:
    """The latent inside [latent, rotary key], as MLA hands it over."""
    return {"x": maker.normal(5, 48)[:, :32], "weight": maker.normal(32, std=0.1, mean=1.0), "eps": 1e-6}


CASES = (
    *(
        Case(name=f"T{T}-D{D}", inputs=_inputs(T, D), gradients=("x", "weight"))
        for T, D in ((1, 512), (7, 192), (63, 100), (3, 2048))
    ),
    Case(name="view", inputs=_view, gradients=("x", "weight")),
    Case(name="empty", inputs=_inputs(0, 64), gradients=("x", "weight")),
)


def _benchmark(T: int, D: int, backward: bool) -> Benchmark:
    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(T, D, device=device, dtype=torch.bfloat16)
        return {"x": x, "weight": torch.ones(D, device=device, dtype=torch.bfloat16), "eps": 1e-6}

    return Benchmark(
        name=f"T{T}-D{D}{'-backward' if backward else ''}",
        inputs=make,
        flops=4.0 * T * D,
        bytes=2.0 * T * D * (5 if backward else 2),
        gradients=("x", "weight"),
        backward=backward,
        baselines={"torch": lambda x, weight, eps: F.rms_norm(x, (x.shape[-1],), weight, eps)},
    )


BENCHMARKS = (_benchmark(16384, 2048, False), _benchmark(16384, 2048, True), _benchmark(64, 2048, False))
