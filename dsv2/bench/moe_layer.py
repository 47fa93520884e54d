"""The whole MoE layer as the model runs it, router and shared experts too, measured like a room of dsv2/kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark
from dsv2.kernels.grouped_mlp import grouped_mlp, reference, swiglu_mlp
from dsv2.kernels.route import route
from dsv2.kernels.route.reference import route as reference_route

E, A, D, WIDTH, SHARED = 64, 6, 2048, 1408, 2
"""V2-Lite's experts, experts a token, hidden size, width of an expert, shared experts."""


def moe_layer(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, gate: Tensor, up: Tensor, shared_down: Tensor
) -> Tensor:
    """[T, D] to [T, D], without the residual."""
    _, experts, gates, counts = route(x, router, experts_per_token=A)
    return grouped_mlp(x, experts, gates, gate_up, down, swiglu_mlp(x, gate, up, shared_down), counts)


def moe_layer_reference(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, gate: Tensor, up: Tensor, shared_down: Tensor
) -> Tensor:
    _, experts, gates, _ = reference_route(x, router, experts_per_token=A)
    shared = reference.swiglu_mlp(x, gate, up, shared_down)
    return reference.grouped_mlp(x, experts, gates, gate_up, down, shared)


def plain(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, gate: Tensor, up: Tensor, shared_down: Tensor
) -> Tensor:
    """What one writes with torch alone: topk, argsort, two grouped products, indexing."""
    T = len(x)
    gates, experts = F.linear(x.float(), router.float()).softmax(-1).topk(A, -1)
    order = experts.flatten().argsort(stable=True)
    ends = (experts.flatten()[:, None] == torch.arange(E, device=x.device)).sum(0).cumsum(0).int()
    g, u = F.grouped_mm(x[order // A], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(g) * u, down.transpose(1, 2), offs=ends)
    routed = (rows[order.argsort()].view(T, A, D) * gates[:, :, None]).sum(1).to(x.dtype)
    return routed + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), shared_down)


def _inputs(T: int) -> Callable[[torch.device], dict[str, Any]]:
    def make(device: torch.device) -> dict[str, Any]:
        def normal(*shape: int, std: float = 0.02) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(std)

        return {
            "x": normal(T, D, std=1.0),
            "router": normal(E, D),
            "gate_up": normal(E, 2 * WIDTH, D),
            "down": normal(E, D, WIDTH),
            "gate": normal(SHARED * WIDTH, D),
            "up": normal(SHARED * WIDTH, D),
            "shared_down": normal(D, SHARED * WIDTH),
        }

    return make


def _benchmark(T: int, target_us: float | None = None, backward: bool = False) -> Benchmark:
    # Expected number of different experts: what T tokens touch of the weights.
    touched = E * (1 - (1 - A / E) ** T) + SHARED
    return Benchmark(
        name=f"V2-Lite-T{T}{'-backward' if backward else ''}",
        function="moe_layer",
        inputs=_inputs(T),
        flops=6.0 * T * (A + SHARED) * D * WIDTH * (3 if backward else 1),
        bytes=touched * 3 * D * WIDTH * 2 * (3 if backward else 1) + 4.0 * T * D,
        gradients=("x", "router", "gate_up", "down", "gate", "up", "shared_down"),
        backward=backward,
        baselines={"torch": plain},
        target_us=target_us,
    )


# The routed part's targets, the shared experts' bytes at 3.02 TB/s (11.5 us), and 15 us.
BENCHMARKS = (
    _benchmark(1, 76.5),
    _benchmark(8),
    _benchmark(32, 446.5),
    _benchmark(64, 456.5),
    _benchmark(128, 461.5),
    _benchmark(256, 466.5),
    _benchmark(512, 476.5),
    _benchmark(2048),
    _benchmark(16384),
    _benchmark(16384, 15_100.0, backward=True),
)
