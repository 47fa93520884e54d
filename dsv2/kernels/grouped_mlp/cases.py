"""Inputs for grouped_mlp: every path by number of tokens, one expert that takes all rows, experts with none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker


def _inputs(T: int, E: int, A: int, D: int, width: int, *, crowded: bool = False, addend: bool = False) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        scores = torch.rand(T, E, generator=maker.generator)
        experts = torch.zeros(T, A, dtype=torch.int64) + E - 1 if crowded else scores.topk(A, 1).indices
        inputs = {
            "x": maker.normal(T, 2 * D)[:, D:],
            "experts": experts.to(maker.device),
            "gates": maker.normal(T, A, std=0.1, mean=0.3, dtype=torch.float32),
            "gate_up": maker.normal(E, 2 * width, D, std=D**-0.5),
            "down": maker.normal(E, D, width, std=width**-0.5),
        }
        return inputs | ({"addend": maker.normal(T, D)} if addend else {})

    return make


def _dense(T: int, D: int, width: int) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        return {
            "x": maker.normal(T, D),
            "gate": maker.normal(width, D, std=D**-0.5),
            "up": maker.normal(width, D, std=D**-0.5),
            "down": maker.normal(D, width, std=width**-0.5),
        }

    return make


_ALL = ("x", "gates", "gate_up", "down")
_SMALL = {
    "one-token": _inputs(1, 8, 2, 64, 40),
    "unsorted": _inputs(4, 5, 3, 72, 24),
    "few": _inputs(9, 8, 2, 64, 40),
    "T63": _inputs(63, 5, 2, 40, 72),
    "T65-addend": _inputs(65, 4, 3, 40, 24, addend=True),
    "one-expert-takes-all": _inputs(33, 6, 2, 40, 24, crowded=True),
    "many-rows-an-expert": _inputs(140, 3, 2, 40, 24),
    "no-token": _inputs(0, 4, 2, 40, 24),
}
_LARGE = {f"V2-Lite-T{T}": _inputs(T, 64, 6, 2048, 1408) for T in (1, 3, 8, 32, 130, 512, 2048)} | {
    "V2-Lite-one-expert-takes-all": _inputs(512, 64, 6, 2048, 1408, crowded=True),
}

CASES = (
    *(Case(name=name, inputs=inputs) for name, inputs in _SMALL.items()),
    *(
        Case(name=f"{name}-gradients", inputs=inputs, gradients=(*_ALL, "addend") if "addend" in name else _ALL)
        for name, inputs in _SMALL.items()
    ),
    *(Case(name=name, inputs=inputs, dtypes=()) for name, inputs in _LARGE.items()),
    *(
        Case(name=f"T{T}-F{F}", function="swiglu_mlp", inputs=_dense(T, 40, F), gradients=gradients)
        for T, F in ((1, 72), (17, 24), (65, 40), (0, 24))
        for gradients in ((), ("x", "gate", "up", "down"))
    ),
    *(
        Case(name=f"V2-Lite-T{T}", function="swiglu_mlp", inputs=_dense(T, 2048, 2816), dtypes=())
        for T in (1, 64, 300, 600)
    ),
    Case(name="V2-Lite-T600-gradients", inputs=_inputs(600, 64, 6, 2048, 1408), gradients=_ALL, dtypes=()),
)


def _plain(x: Tensor, experts: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What one writes with torch alone: sort, index, two grouped products, index."""
    T, A = experts.shape
    order = experts.flatten().argsort(stable=True)
    ends = (experts.flatten()[:, None] == torch.arange(len(down), device=x.device)).sum(0).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // A], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return (rows[order.argsort()].view(T, A, -1) * gates[:, :, None]).sum(1).to(x.dtype)


def _benchmark(T: int, target_us: float | None, backward: bool = False) -> Benchmark:
    E, A, D, width = 64, 6, 2048, 1408

    def make(device: torch.device) -> dict[str, Any]:
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        gates, experts = torch.rand(T, E, device=device).topk(A, 1)
        return {
            "x": torch.randn(T, D, **bf16),
            "experts": experts,
            "gates": gates,
            "gate_up": torch.randn(E, 2 * width, D, **bf16) * 0.02,
            "down": torch.randn(E, D, width, **bf16) * 0.02,
        }

    # Expected number of different experts: what T tokens touch of the weights.
    touched = E * (1 - (1 - A / E) ** T)
    return Benchmark(
        name=f"V2-Lite-T{T}{'-backward' if backward else ''}",
        inputs=make,
        flops=6.0 * T * A * D * width * (3 if backward else 1),
        bytes=touched * 3 * D * width * 2 * (3 if backward else 1) + 4.0 * T * D,
        gradients=_ALL,
        backward=backward,
        baselines={"torch grouped_mm": _plain},
        target_us=target_us,
    )


BENCHMARKS = (
    _benchmark(1, 50.0),
    _benchmark(8, None),
    _benchmark(32, 420.0),
    _benchmark(64, 430.0),
    _benchmark(128, 435.0),
    _benchmark(256, 440.0),
    _benchmark(512, 450.0),
    _benchmark(2048, 560.0),
    _benchmark(16384, 3300.0),
    _benchmark(16384, None, backward=True),
)
