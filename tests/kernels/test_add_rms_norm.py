"""add_rms_norm beyond parity: bits shared with rms_norm, gradients of either output alone, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels import add_rms_norm as room
from dsv2.kernels.add_rms_norm import kernel, reference
from dsv2.kernels.rms_norm import kernel as rms_norm_kernel
from tests.numerics import assert_close, assert_gradients_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "residual", "weight")


def draw(T: int = 5, D: int = 96, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(shape, generator=generator) for shape in ((T, D), (T, D), (D,)))
    drawn = {n: t.to(device, dtype) for n, t in zip(NAMES, (x, residual, weight), strict=True)}
    return {**drawn, "eps": 1e-6}


def gradients(run: Any, inputs: dict[str, Any], weights: tuple[float, float]) -> dict[str, Tensor]:
    """Of weights[0] * sum(y^2) + weights[1] * sum(total^3); an output of weight 0 is not touched at all."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in NAMES}
    y, total = run(**inputs | leaves)
    terms = [w * x.pow(p).sum() for w, x, p in zip(weights, (y, total), (2, 3), strict=True) if w]
    sum(terms, torch.zeros((), device=DEVICE)).backward()
    return {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)], ids=["y", "total", "both"])
def test_gradients_of_the_outputs_used_equal_the_references(weights: tuple[float, float]) -> None:
    inputs = draw()
    expected = gradients(reference.add_rms_norm, inputs, weights)
    assert_gradients_close(gradients(kernel.add_rms_norm, inputs, weights), expected)


def test_the_weight_has_no_gradient_where_only_the_total_is_used() -> None:
    inputs = draw()
    weight = inputs["weight"].requires_grad_()
    x = inputs["x"].requires_grad_()
    _, total = kernel.add_rms_norm(**inputs)
    dx, dw = torch.autograd.grad(total.sum(), (x, weight), allow_unused=True)
    assert dw is None
    assert torch.equal(dx, torch.ones_like(x))


def test_two_leaves_accumulate_their_gradients_apart() -> None:
    """x and residual receive one tensor, which neither may change for the other."""
    inputs = draw()
    x, residual = inputs["x"].requires_grad_(), inputs["residual"].requires_grad_()
    for _ in range(2):
        kernel.add_rms_norm(**inputs)[0].square().sum().backward()
        if residual.grad is not None and x.grad is not None:
            residual.grad.zero_()
    assert x.grad is not None and residual.grad is not None
    once = gradients(kernel.add_rms_norm, draw(), (1.0, 0.0))["x"]
    assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("D", [64, 512, 700])
def test_bits_equal_those_of_a_sum_and_rms_norm(D: int) -> None:
    inputs = draw(D=D, dtype=torch.float16)
    y, total = kernel.add_rms_norm(**inputs)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert torch.equal(y, rms_norm_kernel.rms_norm(total, inputs["weight"], inputs["eps"]))


@pytest.mark.parametrize("D", [64, 512, 700])
def test_the_bits_of_a_row_do_not_depend_on_its_batch(D: int) -> None:
    inputs = draw(T=9, D=D)
    whole, _ = kernel.add_rms_norm(**inputs)
    for t in (0, 3, 8):
        alone, _ = kernel.add_rms_norm(**inputs | {n: inputs[n][t : t + 1] for n in ("x", "residual")})
        assert torch.equal(alone[0], whole[t])


def test_gradients_repeat_bit_for_bit() -> None:
    first, second = (gradients(kernel.add_rms_norm, draw(T=70), (1.0, 1.0)) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in NAMES)


def test_weight_gradients_add_up_over_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm_kernel, "MULTIPROCESSORS", 1)
    inputs = draw(T=67, D=40)
    expected = gradients(reference.add_rms_norm, inputs, (1.0, 1.0))
    assert_gradients_close(gradients(kernel.add_rms_norm, inputs, (1.0, 1.0)), expected)


def test_the_operators_tell_the_compiler_the_truth() -> None:
    inputs = draw(T=3, D=8)
    leaves = [inputs[n].requires_grad_() for n in NAMES]
    torch.library.opcheck(kernel._forward.op, (*leaves, inputs["eps"]))
    rms = torch.ones(3, device=DEVICE)
    x, residual, weight = (leaf.detach() for leaf in leaves)
    for other in (None, residual):
        torch.library.opcheck(rms_norm_kernel.rms_norm_backward.op, (x, weight, rms, residual, other))


def test_float64_stays_float64_in_the_reference() -> None:
    y, total = room.add_rms_norm(**draw(dtype=torch.float64, device="cpu"))
    assert y.dtype == total.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": torch.zeros(4, 96)}, r"residual has shape \(4, 96\), expected \(5, 96\)"),
        ({"weight": torch.zeros(95)}, r"weight has shape \(95,\), expected \(96\)"),
        ({"weight": torch.zeros(96, dtype=torch.float16)}, "weight is float16, expected float32"),
        ({"residual": torch.zeros(5, 96, dtype=torch.bfloat16)}, "residual is bfloat16, expected float32"),
        ({"residual": torch.zeros(5, 96, device="meta")}, "residual is on meta, x on cpu"),
    ],
)
def test_arguments_that_do_not_match_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        room.add_rms_norm(**draw(device="cpu") | changes)
