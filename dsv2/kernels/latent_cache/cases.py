"""Inputs for write_latent: slots in any order, rows of padding, an unwritten cache full of NaN, odd widths, views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker
from dsv2.kernels.latent_cache import PAGE_SIZE
from dsv2.kernels.rope.cases import complex_product, tables

NAN = float("nan")


def _inputs(T: int, C: int, R: int, layout: str = "interleaved", *, P: int = 2, num_padding: int = 0) -> Inputs:
    """The last `num_padding` rows, scattered among the others, hold NaN and go nowhere."""

    def make(maker: Maker) -> dict[str, Any]:
        kv = maker.normal(T, C + R)
        order = torch.randperm(T, generator=maker.generator)[:num_padding]
        slots = torch.randperm(P * PAGE_SIZE, generator=maker.generator)[:T]
        slots[order] = -1
        kv[order.to(kv.device)] = NAN
        return _with_cache(maker, kv, C, P, layout) | {"slots": slots.to(maker.device)}

    return make


def _with_cache(maker: Maker, kv: Tensor, C: int, P: int, layout: str = "interleaved") -> dict[str, Any]:
    T, R = kv.shape[0], kv.shape[1] - C
    return {
        "kv": kv,
        "weight": maker.normal(C, std=0.1, mean=1.0),
        "eps": 1e-6,
        **tables(maker, T, R),
        "layout": layout,
        "cache": torch.full((P, PAGE_SIZE, C + R), NAN, device=maker.device, dtype=maker.dtype),
    }


def _last_columns(maker: Maker) -> dict[str, Any]:
    """Of a projection that makes queries too."""
    fused = torch.full((7, 200), NAN, device=maker.device, dtype=maker.dtype)
    fused[:, 120:] = maker.normal(7, 80)
    slots = maker.tensor([127, 0, -1, 64, 63, -5, 1], torch.int64)
    return _with_cache(maker, fused[:, 120:], 64, 2) | {"slots": slots}


def _written_before(maker: Maker) -> dict[str, Any]:
    inputs = _with_cache(maker, maker.normal(3, 40), 32, 1)
    return inputs | {"cache": maker.normal(1, PAGE_SIZE, 40), "slots": maker.tensor([40, -1, 2], torch.int64)}


def _with_queries(inputs: Inputs, H: int) -> Inputs:
    """Queries inside wider heads, amid NaN."""

    def make(maker: Maker) -> dict[str, Any]:
        made = inputs(maker)
        (T, X), C = made["kv"].shape, len(made["weight"])
        q = torch.full((T, H, X - C + 16), NAN, device=maker.device, dtype=maker.dtype)
        q[..., 8 : X - C + 8] = maker.normal(T, H, X - C)
        return made | {"q_rope": q[..., 8 : X - C + 8]}

    return make


CASES = tuple(
    Case(name=name, function="write_latent", inputs=inputs, mutated=("cache", "q_rope")[: 1 + ("queries" in name)])
    for name, inputs in {
        "T9-C512-R64": _inputs(9, 512, 64, num_padding=3),
        "T3-C512-R64-half": _inputs(3, 512, 64, "half"),
        "T65-C24-R6": _inputs(65, 24, 6, P=3, num_padding=20),
        "T65-C100-R10-half": _inputs(65, 100, 10, "half", num_padding=1),
        "T1-C513-R2": _inputs(1, 513, 2),
        "T2-C1536-R128": _inputs(2, 1536, 128, P=1),
        "full-pages": _inputs(128, 16, 4),
        "last-columns": _last_columns,
        "written-before": _written_before,
        "padding-alone": _inputs(5, 32, 8, num_padding=5),
        "no-rows": _inputs(0, 32, 8),
        "queries-T9-H16": _with_queries(_inputs(9, 512, 64, num_padding=3), 16),
        "queries-T65-H3-half": _with_queries(_inputs(65, 100, 10, "half", num_padding=1), 3),
        "queries-no-heads": _with_queries(_inputs(3, 32, 8), 0),
    }.items()
)


def _torch(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, cache: Tensor, slots: Tensor
) -> None:
    """For rows without padding, and no queries."""
    C = weight.shape[0]
    c_kv = F.rms_norm(kv[:, :C], (C,), weight, eps)
    k_rope = complex_product(kv[:, None, C:], cos, sin, layout)[:, 0]
    cache.view(-1, cache.shape[-1])[slots] = torch.cat((c_kv, k_rope), -1)


def _benchmark(T: int, C: int = 512, R: int = 64) -> Benchmark:
    P = max(2 * T // PAGE_SIZE, 64)

    def make(device: torch.device) -> dict[str, Any]:
        angles = torch.rand(T, R // 2, device=device) * 6.3
        return {
            "kv": torch.randn(T, C + R, device=device, dtype=torch.bfloat16),
            "weight": torch.ones(C, device=device, dtype=torch.bfloat16),
            "eps": 1e-6,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "layout": "interleaved",
            "cache": torch.zeros(P, PAGE_SIZE, C + R, device=device, dtype=torch.bfloat16),
            "slots": torch.randperm(P * PAGE_SIZE, device=device)[:T],
        }

    return Benchmark(
        name=f"T{T}-C{C}-R{R}",
        function="write_latent",
        inputs=make,
        flops=4.0 * T * C + 3.0 * T * R,
        # The row read and written, both tables and the slot read.
        bytes=T * (2.0 * 2 * (C + R) + 4 * R + 8),
        mutated=("cache",),
        baselines={"torch": _torch},
    )


BENCHMARKS = (_benchmark(16384), _benchmark(512), _benchmark(64), _benchmark(1))
