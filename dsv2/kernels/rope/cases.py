"""Inputs for rope: queries inside their heads, the one key beside the latent, odd widths, tables with a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker


def tables(maker: Maker, T: int, R: int, factor: float = 1.0) -> dict[str, Tensor]:
    angles = maker.normal(T, R // 2, std=3.0, dtype=torch.float32)
    return {"cos": angles.cos() * factor, "sin": angles.sin() * factor}


def _inputs(T: int, H: int, R: int, layout: str, factor: float = 1.0) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        return {"x": maker.normal(T, H, R), **tables(maker, T, R, factor), "layout": layout}

    return make


def _view(view: Callable[[Tensor], Tensor], *shape: int) -> Inputs:
    """`view` of a tensor of `shape`, with NaN wherever it does not look."""

    def make(maker: Maker) -> dict[str, Any]:
        drawn = maker.normal(*shape)
        base = torch.full_like(drawn, float("nan"))
        view(base).copy_(view(drawn))
        x = view(base)
        return {"x": x, **tables(maker, x.shape[0], x.shape[2]), "layout": "interleaved"}

    return make


CASES = (
    *(
        Case(name=f"T{T}-H{H}-R{R}-{layout}", inputs=_inputs(T, H, R, layout), gradients=("x",))
        for T, H, R in ((1, 16, 64), (65, 1, 64), (3, 5, 6), (2, 1, 2), (2, 130, 20))
        for layout in ("interleaved", "half")
    ),
    Case(name="factor-interleaved", inputs=_inputs(3, 2, 8, "interleaved", factor=1.3), gradients=("x",)),
    Case(name="factor-half", inputs=_inputs(3, 2, 8, "half", factor=1.3), gradients=("x",)),
    Case(name="last-64-of-192", inputs=_view(lambda x: x[..., 128:], 5, 4, 192), gradients=("x",)),
    Case(name="key-beside-latent", inputs=_view(lambda x: x[:, None, 48:], 63, 64), gradients=("x",)),
    Case(name="heads-first", inputs=_view(lambda x: x.transpose(0, 1), 3, 5, 8), gradients=("x",)),
    Case(name="channels-apart", inputs=_view(lambda x: x[..., ::2], 3, 2, 16), gradients=("x",)),
    *(
        Case(name=f"in-place-{name}", function="rope_", inputs=inputs, mutated=("x",))
        for name, inputs in (
            ("interleaved", _inputs(65, 5, 6, "interleaved")),
            ("half", _inputs(3, 5, 20, "half")),
            ("last-64-of-192", _view(lambda x: x[..., 128:], 5, 4, 192)),
        )
    ),
    Case(name="no-rows", inputs=_inputs(0, 4, 8, "interleaved"), gradients=("x",)),
    Case(name="no-heads", inputs=_inputs(4, 0, 8, "half"), gradients=("x",)),
)


def complex_product(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """As the official code does it, for interleaved pairs."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(cos, sin)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _benchmark(T: int, H: int, *, width: int = 192, backward: bool = False) -> Benchmark:
    """The last 64 channels of each head's `width`."""
    R = 64

    def make(device: torch.device) -> dict[str, Any]:
        x = torch.randn(T, H, width, device=device, dtype=torch.bfloat16)[..., -R:]
        angles = torch.rand(T, R // 2, device=device) * 6.3
        return {"x": x, "cos": angles.cos(), "sin": angles.sin(), "layout": "interleaved"}

    passes = 2 if backward else 1
    return Benchmark(
        name=f"T{T}-H{H}{'-backward' if backward else ''}",
        inputs=make,
        flops=3.0 * T * H * R * passes,
        # The tensor read and written, and both tables read.
        bytes=(2.0 * 2 * T * H * R + 4.0 * T * R) * passes,
        gradients=("x",),
        backward=backward,
        baselines={"torch, complex": complex_product},
    )


BENCHMARKS = (
    _benchmark(16384, 16),
    _benchmark(16384, 16, backward=True),
    _benchmark(8192, 128),
    _benchmark(16384, 1, width=576),
    _benchmark(64, 16),
    _benchmark(64, 128),
)
