"""rope beyond parity: what a rotation keeps, how the layouts relate, the transpose as gradient, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels import rope as room
from dsv2.kernels.rope import kernel, reference
from dsv2.kernels.rope.cases import complex_product
from tests.numerics import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = pytest.mark.parametrize("layout", room.LAYOUTS)


def draw(T: int = 5, H: int = 3, R: int = 8, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(T, H, R, generator=generator), 3 * torch.randn(T, R // 2, generator=generator)
    return x.to(DEVICE), (factor * angles.cos()).to(DEVICE), (factor * angles.sin()).to(DEVICE)


@LAYOUTS
def test_position_zero_keeps_every_bit(layout: str) -> None:
    x, cos, sin = draw()
    assert torch.equal(kernel.rope(x, torch.ones_like(cos), torch.zeros_like(sin), layout), x)


@LAYOUTS
def test_lengths_are_kept(layout: str) -> None:
    x, cos, sin = draw()
    assert_close(kernel.rope(x, cos, sin, layout).norm(dim=-1), x.norm(dim=-1))


@LAYOUTS
def test_products_depend_on_the_distance_alone(layout: str) -> None:
    x, _, _ = draw(T=2)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], device=DEVICE)

    def product(positions: tuple[float, float]) -> Tensor:
        angles = torch.tensor(positions, device=DEVICE)[:, None] * frequencies
        q, k = kernel.rope(x, angles.cos(), angles.sin(), layout)
        return (q * k).sum(-1)

    assert_close(product((7.0, 3.0)), product((11.0, 7.0)))


def test_half_is_interleaved_with_its_channels_reordered() -> None:
    x, cos, sin = draw()
    order = torch.arange(8, device=DEVICE).view(2, 4).T.flatten()
    interleaved = kernel.rope(x[..., order], cos, sin, "interleaved")
    assert torch.equal(kernel.rope(x, cos, sin, "half")[..., order], interleaved)


@pytest.mark.parametrize("run", [kernel.rope, reference.rope], ids=["kernel", "reference"])
def test_interleaved_is_a_product_of_complex_numbers(run: Callable[..., Tensor]) -> None:
    x, cos, sin = draw(R=64)
    assert_close(run(x, cos, sin, "interleaved"), complex_product(x, cos, sin, "interleaved"))


@LAYOUTS
def test_the_gradient_is_the_transpose_and_keeps_the_factor(layout: str) -> None:
    """<dy, rope(x)> = <rope^T(dy), x>, which the inverse would miss by the factor's square."""
    x, cos, sin = draw(factor=1.5)
    x.requires_grad_()
    y = kernel.rope(x, cos, sin, layout)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close((dx * x).sum(), (dy * y).sum())
    assert_close(kernel.rope(dx, cos, sin, layout), 1.5**2 * dy)


@LAYOUTS
def test_gradients_of_any_strides_are_taken(layout: str) -> None:
    x, cos, sin = draw()
    x.requires_grad_()
    y = kernel.rope(x, cos, sin, layout)
    expanded = torch.ones(1, 1, 1, device=DEVICE).expand(y.shape)
    wide = torch.full((3, 5, 24), float("nan"), device=DEVICE)
    wide[..., 16:] = 1.0
    inside = wide[..., 16:].transpose(0, 1)
    results = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in (expanded, inside, torch.ones_like(y))]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_tables_get_no_gradient() -> None:
    x, cos, sin = draw()
    cos.requires_grad_()
    y = kernel.rope(x.requires_grad_(), cos, sin, "half")
    assert torch.autograd.grad(y.sum(), cos, allow_unused=True) == (None,)


def test_the_operator_tells_the_compiler_the_truth() -> None:
    x, cos, sin = draw(T=2, H=2, R=4)
    for transposed in (False, True):
        torch.library.opcheck(kernel._rotate.op, (x.requires_grad_(), cos, sin, "interleaved", transposed))


def test_float64_stays_float64_in_the_reference() -> None:
    x, cos, sin = (t.cpu().double() for t in draw())
    y = room.rope(x, cos, sin, "interleaved")
    assert y.dtype == torch.float64
    assert (y.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x has shape \(5, 8\), expected \(any, any, any\)"),
        ({"x": torch.zeros(5, 3, 7)}, "x has 7 rotary channels, expected pairs"),
        ({"x": torch.zeros(5, 3, 0)}, "x has 0 rotary channels, expected pairs"),
        ({"cos": torch.zeros(4, 4)}, r"cos has shape \(4, 4\), expected \(5, 4\)"),
        ({"sin": torch.zeros(5, 8)}, r"sin has shape \(5, 8\), expected \(5, 4\)"),
        ({"sin": torch.zeros(5, 4, device="meta")}, "sin is on meta, x on cpu"),
        ({"layout": "pairs"}, "layout='pairs' must be 'interleaved' or 'half'"),
    ],
)
def test_arguments_that_do_not_match_are_refused(changes: dict[str, Any], message: str) -> None:
    x, cos, sin = (t.cpu() for t in draw())
    with pytest.raises(ValueError, match=message):
        room.rope(**{"x": x, "cos": cos, "sin": sin, "layout": "half", **changes})
