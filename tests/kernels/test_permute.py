"""permute beyond parity: permutations, what route hands over, round trips, roundings, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels import permute as room
from dsv2.kernels.permute import kernel, reference
from dsv2.kernels.permute.cases import count_blocks
from dsv2.kernels.route import ROUTE_BLOCK
from dsv2.kernels.route import kernel as router
from tests.numerics import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = pytest.mark.parametrize("run", [kernel, reference], ids=["kernel", "reference"])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw_experts(T: int = 70, A: int = 3, E: int = 9) -> Tensor:
    return torch.randint(E, (T, A), generator=generator()).to(DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator()).to(DEVICE, dtype)


# Sorting ----------------------------------------------------------------------------------------------------------


@IMPLEMENTATIONS
def test_sorted_rows_are_in_order_of_expert_then_of_row(run) -> None:
    experts = draw_experts()
    order, inverse, ends = run.sort_rows(experts, 9)
    rows = torch.arange(experts.numel(), device=DEVICE)
    assert torch.equal(order.sort().values, rows.int())
    assert torch.equal(order[inverse], rows.int())
    keys = experts.flatten()[order] * experts.numel() + order
    assert (keys[1:] > keys[:-1]).all()
    assert torch.equal(ends.diff(prepend=ends.new_zeros(1)).long(), experts.flatten().bincount(minlength=9))


@pytest.mark.parametrize("T", [1, ROUTE_BLOCK, ROUTE_BLOCK + 1, 17 * ROUTE_BLOCK + 3])
def test_counts_at_hand_change_nothing(T: int) -> None:
    experts = draw_experts(T)
    counted, uncounted = (kernel.sort_rows(experts, 9, c) for c in (count_blocks(experts, 9), None))
    assert all(torch.equal(a, b) for a, b in zip(counted, uncounted, strict=True))


def test_the_counts_of_route_are_those_that_sorting_needs() -> None:
    h, weight = draw(75, 16), draw(12, 16)
    _, experts, _, counts = router.route(h, weight, experts_per_token=4, num_groups=3, groups_per_token=2)
    expected = reference.sort_rows(experts, 12)
    assert all(torch.equal(a, b) for a, b in zip(kernel.sort_rows(experts, 12, counts), expected, strict=True))


@IMPLEMENTATIONS
def test_without_tokens_every_expert_ends_at_zero(run) -> None:
    order, inverse, ends = run.sort_rows(draw_experts(0), 9)
    assert len(order) == len(inverse) == 0
    assert ends.tolist() == [0] * 9


# There and back ---------------------------------------------------------------------------------------------------


@IMPLEMENTATIONS
def test_halves_of_a_token_gathered_and_combined_are_the_token(run) -> None:
    x = draw(70, 20)
    order, inverse, _ = run.sort_rows(draw_experts(A=2), 9)
    halves = torch.full((70, 2), 0.5, device=DEVICE)
    assert torch.equal(run.combine_rows(run.gather_rows(x, order, inverse, 2), inverse, halves), x)


@IMPLEMENTATIONS
def test_rows_are_combined_in_fp32_and_rounded_once(run) -> None:
    """2048 + 1 + 1 + 1 is 2051 exactly, and 2048 where fp16 rounds every sum."""
    rows = torch.tensor([2048.0, 1.0, 1.0], device=DEVICE)[:, None].half()
    inverse = torch.arange(3, dtype=torch.int32, device=DEVICE)
    addend = torch.ones(1, 1, device=DEVICE).half()
    combined = run.combine_rows(rows, inverse, torch.ones(1, 3, device=DEVICE), addend)
    assert combined.item() == torch.tensor(2051.0).half().item()


@IMPLEMENTATIONS
def test_the_gradient_of_a_token_is_added_up_in_fp32(run) -> None:
    x = torch.zeros(1, 1, device=DEVICE).half().requires_grad_()
    order = torch.arange(3, dtype=torch.int32, device=DEVICE)
    cotangent = torch.tensor([2048.0, 1.0, 1.0], device=DEVICE)[:, None].half()
    (dx,) = torch.autograd.grad(run.gather_rows(x, order, order, 3), x, cotangent)
    assert dx.item() == 2050.0


def test_a_token_gets_the_same_bits_wherever_it_stands() -> None:
    """Alone its row is cut into pieces, among many it is not."""
    T, A, D = 300, 2, 600
    rows, gates, addend = draw(T * A, D), draw(T, A), draw(T, D)
    inverse = torch.randperm(T * A, generator=generator()).int().to(DEVICE)
    together = kernel.combine_rows(rows, inverse, gates, addend)
    for t in (0, 1, T - 1):
        own = rows[inverse[t * A : (t + 1) * A]]
        places = torch.arange(A, dtype=torch.int32, device=DEVICE)
        alone = kernel.combine_rows(own, places, gates[t : t + 1], addend[t : t + 1])
        assert torch.equal(alone[0], together[t])


def test_rows_in_the_order_of_tokens_are_combined_without_places() -> None:
    rows, gates, addend = draw(15, 20), draw(5, 3), draw(5, 20)
    places = torch.arange(15, dtype=torch.int32, device=DEVICE)
    assert torch.equal(kernel.combine_rows(rows, None, gates, addend), kernel.combine_rows(rows, places, gates, addend))


# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["rows", "gates", "addend"])
def test_each_gradient_of_a_combination_can_be_asked_for_alone(wanted: str) -> None:
    def gradient(run) -> Tensor:
        _, inverse, _ = reference.sort_rows(draw_experts(5), 9)
        inputs = {"rows": draw(15, 20), "inverse": inverse, "gates": draw(5, 3), "addend": draw(5, 20)}
        inputs[wanted].requires_grad_()
        return torch.autograd.grad(run.combine_rows(**inputs).square().sum(), inputs[wanted])[0]

    assert_close(gradient(kernel), gradient(reference))


def test_gradients_of_any_strides_are_taken() -> None:
    order, inverse, _ = reference.sort_rows(draw_experts(5), 9)
    x, rows, gates = draw(5, 20).requires_grad_(), draw(15, 20).requires_grad_(), draw(5, 3)
    for y, leaf in ((kernel.gather_rows(x, order, inverse, 3), x), (kernel.combine_rows(rows, inverse, gates), rows)):
        for cotangent in (torch.ones(1, device=DEVICE).expand(y.shape), draw(20, len(y)).T):
            (given,) = torch.autograd.grad(y, leaf, cotangent, retain_graph=True)
            (copied,) = torch.autograd.grad(y, leaf, cotangent.contiguous(), retain_graph=True)
            assert torch.equal(given, copied)


# The operators ----------------------------------------------------------------------------------------------------


def test_the_operators_are_fit_for_compilation() -> None:
    experts = draw_experts(5)
    torch.library.opcheck(kernel._sort.op, (experts, 9, None))
    torch.library.opcheck(kernel._sort.op, (experts, 9, count_blocks(experts, 9)))
    _, inverse, _ = reference.sort_rows(experts, 9)
    x, rows, gates = draw(5, 20).requires_grad_(), draw(15, 20).requires_grad_(), draw(5, 3).requires_grad_()
    torch.library.opcheck(kernel._gather.op, (x, inverse, 3))
    torch.library.opcheck(kernel._gather_backward.op, (rows.detach(), inverse, 3))
    torch.library.opcheck(kernel._combine.op, (rows, inverse, gates, None))
    torch.library.opcheck(kernel._combine.op, (rows, inverse, gates, x))
    torch.library.opcheck(kernel._combine_backward.op, (x.detach(), rows.detach(), inverse, gates.detach()))


# Refusals ---------------------------------------------------------------------------------------------------------


SORT = {"experts": torch.zeros(5, 3, dtype=torch.int64), "num_experts": 4}
GATHER = {"x": torch.zeros(5, 8), "order": torch.zeros(15).int(), "inverse": torch.zeros(15).int()}
GATHER |= {"experts_per_token": 3}
COMBINE = {"rows": torch.zeros(15, 8), "inverse": torch.zeros(15).int(), "gates": torch.zeros(5, 3)}


@pytest.mark.parametrize(
    ("function", "arguments", "change", "message"),
    [
        ("sort_rows", SORT, {"experts": torch.zeros(5, 3)}, "experts is float32, expected int64"),
        ("sort_rows", SORT, {"experts": torch.zeros(5)}, r"experts has shape \(5,\), expected \(any, any\)"),
        ("sort_rows", SORT, {"block_counts": torch.zeros(2, 4).int()}, r"block_counts has shape .* expected \(1, 4\)"),
        ("sort_rows", SORT, {"block_counts": torch.zeros(1, 4)}, "block_counts is float32, expected int32"),
        ("gather_rows", GATHER, {"order": torch.zeros(14).int()}, r"order has shape \(14,\), expected \(15\)"),
        ("gather_rows", GATHER, {"inverse": torch.zeros(15)}, "inverse is float32, expected int32"),
        ("gather_rows", GATHER, {"inverse": torch.zeros(15, device="meta").int()}, "inverse is on meta, x on cpu"),
        ("combine_rows", COMBINE, {"rows": torch.zeros(14, 8)}, r"rows has shape \(14, 8\), expected \(15, any\)"),
        ("combine_rows", COMBINE, {"addend": torch.zeros(5, 7)}, r"addend has shape \(5, 7\), expected \(5, 8\)"),
        ("combine_rows", COMBINE, {"addend": torch.zeros(5, 8).half()}, "addend is float16, expected float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_does_not_match_is_refused(
    function: str, arguments: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(room, function)(**(arguments | change))
