"""Inputs for the permutation: official sizes, odd ones, one expert with all rows or none, views, no token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker
from dsv2.kernels.permute import reference
from dsv2.kernels.route import ROUTE_BLOCK


def count_blocks(experts: Tensor, num_experts: int) -> Tensor:
    """What `route` returns beside these experts, [ceil(T / ROUTE_BLOCK), E] int32."""
    T = len(experts)
    num_blocks = -(-T // ROUTE_BLOCK)
    counts = torch.zeros(num_blocks * ROUTE_BLOCK, num_experts, dtype=torch.int32, device=experts.device)
    counts[:T] = (experts[:, :, None] == torch.arange(num_experts, device=experts.device)).sum(1, dtype=torch.int32)
    return counts.view(num_blocks, ROUTE_BLOCK, num_experts).sum(1, dtype=torch.int32)


def _sort(T: int, A: int, E: int, low: int = 0, high: int | None = None, *, counted: bool = True) -> Inputs:
    """Experts drawn from [low, high), a token's not always distinct."""

    def make(maker: Maker) -> dict[str, Any]:
        experts = maker.integers(low, E if high is None else high, T, A)
        counts = count_blocks(experts, E) if counted else None
        return {"experts": experts, "num_experts": E, "block_counts": counts}

    return make


def _strided_experts(maker: Maker) -> dict[str, Any]:
    return {"experts": maker.integers(0, 5, 3, 40).T, "num_experts": 5, "block_counts": None}


def _places(maker: Maker, T: int, A: int, E: int) -> tuple[Tensor, Tensor]:
    order, inverse, _ = reference.sort_rows(maker.integers(0, E, T, A), E)
    return order, inverse


def _inside(maker: Maker, rows: int, width: int, view: bool) -> Tensor:
    """[rows, width]; as a view, the middle of wider rows that hold NaN beside it."""
    x = maker.normal(rows, width + 16)
    x[:, :8], x[:, width + 8 :] = float("nan"), float("nan")
    middle = x[:, 8 : width + 8]
    return middle if view else middle.contiguous()


def _gather(T: int, A: int, E: int, D: int, view: bool = False) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        order, inverse = _places(maker, T, A, E)
        return {"x": _inside(maker, T, D, view), "order": order, "inverse": inverse, "experts_per_token": A}

    return make


def _combine(T: int, A: int, E: int, D: int, view: bool = False, added: bool = True) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        _, inverse = _places(maker, T, A, E)
        gates = maker.normal(T, A, dtype=torch.float32)
        addend = {"addend": _inside(maker, T, D, view)} if added else {}
        return {"rows": _inside(maker, T * A, D, view), "inverse": inverse, "gates": gates, **addend}

    return make


_SIZES = ((1, 6, 64), (63, 2, 5), (64, 1, 8), (65, 3, 160), (0, 6, 64), (35, 8, 256))

CASES = (
    *(Case(name=f"T{T}-A{A}-E{E}", function="sort_rows", inputs=_sort(T, A, E)) for T, A, E in _SIZES),
    *(
        Case(name=f"T{T}-A{A}-E{E}-uncounted", function="sort_rows", inputs=_sort(T, A, E, counted=False))
        for T, A, E in _SIZES
    ),
    Case(name="one-expert-takes-all", function="sort_rows", inputs=_sort(40, 3, 5, 3, 4)),
    Case(name="experts-without-rows", function="sort_rows", inputs=_sort(40, 2, 64, 20, 27)),
    Case(name="many-blocks", function="sort_rows", inputs=_sort(17 * ROUTE_BLOCK + 1, 2, 5)),
    Case(name="many-blocks-a-program", function="sort_rows", inputs=_sort(129 * ROUTE_BLOCK + 1, 1, 3)),
    Case(name="strided", function="sort_rows", inputs=_strided_experts),
    *(
        Case(name=f"T{T}-A{A}-D{D}", function="gather_rows", inputs=_gather(T, A, 5, D), gradients=("x",))
        for T, A, D in ((1, 6, 2048), (63, 2, 100), (65, 1, 8), (5, 3, 1), (0, 6, 64))
    ),
    Case(name="view", function="gather_rows", inputs=_gather(5, 2, 5, 40, view=True), gradients=("x",)),
    Case(name="one-expert", function="gather_rows", inputs=_gather(7, 3, 1, 16), gradients=("x",)),
    *(
        Case(
            name=f"T{T}-A{A}-D{D}",
            function="combine_rows",
            inputs=_combine(T, A, 5, D),
            gradients=("rows", "gates", "addend"),
        )
        for T, A, D in ((1, 6, 2048), (64, 2, 100), (65, 1, 8), (5, 3, 1), (0, 6, 64))
    ),
    Case(
        name="view",
        function="combine_rows",
        inputs=_combine(5, 2, 5, 40, view=True),
        gradients=("rows", "gates", "addend"),
    ),
    Case(
        name="without-addend",
        function="combine_rows",
        inputs=_combine(7, 8, 9, 24, added=False),
        gradients=("rows", "gates"),
    ),
)

# Benchmarks: what route's choices look like when every expert is as likely --------------------------------------------


def _draw(T: int, A: int, E: int, device: torch.device) -> Tensor:
    return torch.rand(T, E, device=device).argsort(1)[:, :A]


def plain_sort(experts: Tensor, num_experts: int, block_counts: Tensor | None = None) -> tuple[Tensor, ...]:
    """Counts by a search in the sorted experts."""
    sorted_M, order_M = experts.flatten().sort(stable=True)
    places = torch.arange(len(order_M), device=experts.device)
    inverse_M = torch.empty_like(order_M).scatter_(0, order_M, places)
    ends_E = torch.searchsorted(sorted_M, torch.arange(num_experts, device=experts.device), right=True)
    return order_M.int(), inverse_M.int(), ends_E.int()


def _sort_benchmark(T: int, E: int) -> Benchmark:
    A = 6

    def make(device: torch.device) -> dict[str, Any]:
        experts = _draw(T, A, E, device)
        return {"experts": experts, "num_experts": E, "block_counts": count_blocks(experts, E)}

    return Benchmark(
        name=f"T{T}-E{E}",
        function="sort_rows",
        inputs=make,
        flops=0.0,
        bytes=16.0 * T * A + 4.0 * E * (T / ROUTE_BLOCK + 1),
        baselines={"torch": plain_sort},
    )


def _gather_benchmark(T: int, D: int, backward: bool = False) -> Benchmark:
    A, E = 6, 64

    def make(device: torch.device) -> dict[str, Any]:
        order, inverse, _ = reference.sort_rows(_draw(T, A, E, device), E)
        x = torch.randn(T, D, device=device, dtype=torch.bfloat16)
        return {"x": x, "order": order, "inverse": inverse, "experts_per_token": A}

    return Benchmark(
        name=f"T{T}-D{D}{'-backward' if backward else ''}",
        function="gather_rows",
        inputs=make,
        flops=1.0 * T * A * D if backward else 0.0,
        bytes=(2.0 * T * D * (1 + A) + 4.0 * T * A) * (2 if backward else 1),
        gradients=("x",),
        backward=backward,
        baselines={"torch": lambda x, order, inverse, experts_per_token: x[order // experts_per_token]},
    )


def _combine_benchmark(T: int, D: int, backward: bool = False) -> Benchmark:
    A, E = 6, 64

    def make(device: torch.device) -> dict[str, Any]:
        _, inverse, _ = reference.sort_rows(_draw(T, A, E, device), E)
        rows, addend = (torch.randn(n, D, device=device, dtype=torch.bfloat16) for n in (T * A, T))
        return {"rows": rows, "inverse": inverse, "gates": torch.rand(T, A, device=device), "addend": addend}

    row, row_gradient = 2.0 * T * D, 2.0 * T * D * (1 + 2 * A)
    return Benchmark(
        name=f"T{T}-D{D}{'-backward' if backward else ''}",
        function="combine_rows",
        inputs=make,
        flops=2.0 * T * A * D * (2.5 if backward else 1),
        bytes=row * (2 + A) + 8.0 * T * A + (row_gradient + 12.0 * T * A if backward else 0),
        gradients=("rows", "gates", "addend"),
        backward=backward,
        baselines={"torch": reference.combine_rows},
    )


BENCHMARKS = (
    *(_sort_benchmark(T, 64) for T in (1, 64, 512, 16384)),
    _sort_benchmark(4096, 160),
    *(_gather_benchmark(T, 2048) for T in (1, 64, 512, 16384)),
    _gather_benchmark(16384, 2048, backward=True),
    _gather_benchmark(4096, 5120),
    *(_combine_benchmark(T, 2048) for T in (1, 64, 512, 16384)),
    _combine_benchmark(16384, 2048, backward=True),
    _combine_benchmark(4096, 5120),
)
