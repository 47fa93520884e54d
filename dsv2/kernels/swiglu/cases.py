"""Inputs for swiglu: odd widths, views, large magnitudes, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker


def _two(T: int, width: int, std: float = 1.0) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        wide = maker.normal(T, 2 * width + 1, std=std)
        return {"gate": wide[:, :width], "up": wide[:, width + 1 :]}

    return make


def _packed(T: int, width: int) -> Inputs:
    return lambda maker: {"gate_up": maker.normal(T, 2 * width)}


_SIZES = ((1, 24), (65, 40), (3, 1408), (0, 16))

CASES = (
    *(Case(name=f"T{T}-F{F}", inputs=_two(T, F), gradients=("gate", "up")) for T, F in _SIZES),
    Case(name="large", inputs=_two(7, 33, 30.0), gradients=("gate", "up")),
    *(
        Case(name=f"T{T}-F{F}", function="swiglu_packed", inputs=_packed(T, F), gradients=("gate_up",))
        for T, F in _SIZES
    ),
)


def _benchmark(T: int, width: int, backward: bool) -> Benchmark:
    def make(device: torch.device) -> dict[str, Any]:
        return {"gate_up": torch.randn(T, 2 * width, device=device, dtype=torch.bfloat16)}

    return Benchmark(
        name=f"T{T}-F{width}{'-backward' if backward else ''}",
        function="swiglu_packed",
        inputs=make,
        flops=5.0 * T * width,
        bytes=2.0 * T * width * (8 if backward else 3),
        gradients=("gate_up",),
        backward=backward,
        baselines={"torch": lambda gate_up: F.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]},
    )


BENCHMARKS = (_benchmark(98304, 1408, False), _benchmark(98304, 1408, True), _benchmark(16384, 10944, False))
