"""route beyond parity: ties, groups, gates, counts, tokens that depend on themselves alone, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dsv2.kernels import route as room
from dsv2.kernels.route import kernel, reference
from dsv2.kernels.route.tiles import part_tiles
from tests.numerics import assert_close, rel_err

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
V2 = {"experts_per_token": 6, "num_groups": 8, "groups_per_token": 3, "scaling": 16.0}


def draw(T: int = 40, D: int = 24, E: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(T, D, generator=generator), torch.randn(E, D, generator=generator) / D**0.5
    return h.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def launched(run: Callable[..., Any], *arguments: Any, one: bool, **options: Any) -> Any:
    """What `run` returns where the kernel routes in one launch, or else in parts, whatever the number of tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "in_one_launch", lambda *sizes: one)
        return run(*arguments, **options)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "run",
    [partial(launched, kernel.route, one=True), partial(launched, kernel.route, one=False), reference.route],
    ids=["kernel", "parts", "reference"],
)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


# Choices ----------------------------------------------------------------------------------------------------------


@IMPLEMENTATIONS
def test_equal_experts_are_chosen_from_the_lowest(run) -> None:
    _, weight = draw(E=160)
    h = torch.zeros(3, 24, device=DEVICE)
    assert run(h, weight, experts_per_token=4)[1].tolist() == [[0, 1, 2, 3]] * 3
    assert run(h, weight, **V2)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@IMPLEMENTATIONS
def test_equal_groups_are_chosen_from_the_lowest(run) -> None:
    """Experts 1, 3 and 4 score best, in groups 0, 1 and 2: group 2 is out, however well expert 5 does in it."""
    weight = torch.tensor([0.0, 4.0, 0.0, 4.0, 4.0, 3.0], device=DEVICE)[:, None]
    h = torch.ones(1, 1, device=DEVICE)
    chosen = run(h, weight, experts_per_token=4, num_groups=3, groups_per_token=2)[1]
    assert chosen.tolist() == [[1, 3, 0, 2]]


@IMPLEMENTATIONS
def test_a_group_scores_its_maximum_and_not_its_sum(run) -> None:
    weight = torch.tensor([3.0, -9.0, 2.9, 2.9], device=DEVICE)[:, None]
    h = torch.ones(1, 1, device=DEVICE)
    chosen = run(h, weight, experts_per_token=2, num_groups=2, groups_per_token=1)[1]
    assert chosen.tolist() == [[0, 1]]


@IMPLEMENTATIONS
def test_group_limited_routing_touches_at_most_three_groups(run) -> None:
    h, weight = draw(E=160)
    groups = run(h, weight, **V2)[1] // 20
    assert max(len(set(row)) for row in groups.tolist()) == 3


@IMPLEMENTATIONS
def test_experts_come_best_first_and_once(run) -> None:
    h, weight = draw()
    scores, experts, gates, _ = run(h, weight, experts_per_token=5)
    assert torch.equal(gates, scores.gather(1, experts))
    assert (gates[:, 1:] <= gates[:, :-1]).all()
    assert all(len(set(row)) == 5 for row in experts.tolist())
    assert torch.equal(gates, scores.topk(5).values)


# Gates and counts -------------------------------------------------------------------------------------------------


@IMPLEMENTATIONS
def test_normalized_gates_add_up_to_one_and_are_not_scaled(run) -> None:
    h, weight = draw()
    scores, experts, gates, _ = run(h, weight, experts_per_token=3, normalize=True, scaling=5.0)
    assert_close(gates.sum(1), torch.ones(len(h)))
    chosen = scores.gather(1, experts)
    assert_close(gates, chosen / chosen.sum(1, keepdim=True))


@IMPLEMENTATIONS
def test_a_single_gate_is_scaled_rather_than_normalized(run) -> None:
    h, weight = draw()
    scores, _, gates, _ = run(h, weight, experts_per_token=1, normalize=True, scaling=5.0)
    assert_close(gates[:, 0], 5.0 * scores.amax(1))


@IMPLEMENTATIONS
@pytest.mark.parametrize("T", [1, room.ROUTE_BLOCK, 2 * room.ROUTE_BLOCK + 1])
def test_counts_are_those_of_the_tokens_of_each_block(run, T: int) -> None:
    h, weight = draw(T=T)
    _, experts, _, counts = run(h, weight, experts_per_token=3)
    for block, counted in zip(experts.split(room.ROUTE_BLOCK), counts, strict=True):
        assert torch.equal(torch.bincount(block.flatten(), minlength=16), counted.long())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@IMPLEMENTATIONS
def test_tokens_of_nan_or_infinity_choose_experts_that_exist_and_harm_no_other(run) -> None:
    h, weight = draw(E=160)
    clean = run(h, weight, **V2)
    h[3], h[7, 5], h[11, 0] = float("nan"), float("inf"), float("-inf")
    scores, experts, gates, _ = run(h, weight, **V2)
    odd = [3, 7, 11]
    assert experts[odd].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert scores[odd].isnan().all() and gates[odd].isnan().all()
    others = [t for t in range(len(h)) if t not in odd]
    for before, after in zip(clean[:3], (scores, experts, gates), strict=True):
        assert torch.equal(before[others], after[others])


# A token depends on itself alone ----------------------------------------------------------------------------------


@DTYPES
def test_a_token_gets_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    """Among few tokens and among so many that the launch is another one."""
    h, weight = draw(T=2 * room.ROUTE_BLOCK + 5, D=272, E=20, dtype=dtype)
    many = torch.cat([h] * 70) if DEVICE == "cuda" else h
    options: dict[str, Any] = {"experts_per_token": 4, "num_groups": 5, "groups_per_token": 2}
    expected = kernel.route(many, weight, **options)[:3]
    for t in (0, 1, 17, room.ROUTE_BLOCK, len(many) - 1):
        for alone, together in zip(kernel.route(many[t : t + 1], weight, **options)[:3], expected, strict=True):
            assert torch.equal(alone[0], together[t])


@DTYPES
@pytest.mark.parametrize(
    ("T", "D", "E", "options"),
    [
        (1, 600, 64, {"experts_per_token": 6}),
        (37, 513, 20, {"experts_per_token": 4, "normalize": True}),
        (3, 300, 160, V2),
        (34, 520, 160, V2 | {"normalize": True}),
        (2, 2100, 5, {"experts_per_token": 2}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_one_launch_and_parts_give_the_same_bits(
    T: int, D: int, E: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU in parts of every shape; numpy, which interprets, rounds alike in products of one shape alone."""
    if DEVICE == "cpu":
        BE = max(triton.next_power_of_2(E), 16)
        monkeypatch.setattr(kernel, "part_tiles", lambda *sizes: part_tiles(*sizes) | {"BE": BE})
    for times in (1, 2, 5, 20, 80) if DEVICE == "cuda" else (1,):
        h, weight = draw(T=times * T, D=D, E=E, dtype=dtype)
        whole, parts = (launched(kernel.route, h, weight, one=one, **options) for one in (True, False))
        for of_whole, of_parts in zip(whole, parts, strict=True):
            assert torch.equal(of_whole, of_parts)


def test_the_order_of_experts_changes_no_bit_of_a_score() -> None:
    """Logits that are exact in any order leave the softmax: its sum must not depend on how threads share a row."""
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randint(-4, 5, (n, 24), generator=generator).to(DEVICE) / 8.0 for n in (40, 160))
    order = torch.randperm(160, generator=generator).to(DEVICE)
    scores, shuffled = (kernel.route(h, w, **V2)[0] for w in (weight, weight[order]))
    assert torch.equal(scores[:, order], shuffled)
    assert rel_err(scores, (h.double() @ weight.double().T).softmax(-1)) <= 5e-7


@pytest.mark.parametrize(("D", "E"), [(2048, 64), (5120, 160)])
def test_no_part_is_multiplied_by_instructions_of_warp_groups(D: int, E: int) -> None:
    """64 rows and four warps call for them; one launch has fewer rows, and its sums need not round alike."""
    for T in range(1, 2049):
        tile = part_tiles(T, D, E, ieee=False)
        assert tile["BT"] < 64 or tile["num_warps"] < 4


# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("through", ["scores", "gates"])
@pytest.mark.parametrize("wanted", ["h", "weight"])
def test_one_gradient_through_one_output_is_that_of_the_reference(wanted: str, through: str, normalize: bool) -> None:
    def gradient(run) -> Tensor:
        inputs: dict[str, Tensor] = dict(zip(("h", "weight"), draw(), strict=True))
        inputs[wanted].requires_grad_()
        scores, _, gates, _ = run(**inputs, experts_per_token=3, normalize=normalize, scaling=2.0)
        output = scores if through == "scores" else gates
        # Squares, since scores and normalised gates themselves add up to constants.
        return torch.autograd.grad(output.square().sum(), inputs[wanted])[0]

    assert rel_err(gradient(kernel.route), gradient(reference.route)) <= 1e-4


def test_gradients_of_any_strides_are_taken() -> None:
    h, weight = draw()
    h.requires_grad_()
    _, _, gates, _ = kernel.route(h, weight, experts_per_token=3)
    # The gradient of a sum is one number, expanded.
    (whole,) = torch.autograd.grad(gates.sum(), h, retain_graph=True)
    (copied,) = torch.autograd.grad(gates, h, torch.ones_like(gates))
    assert torch.equal(whole, copied)


def test_two_terms_of_bf16_hold_16_bits_of_a_number() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 1e-6
    high, low = kernel._two_terms(x).double().chunk(2, 1)
    assert ((high + low - x.double()).abs() <= 2.0**-16 * x.abs()).all()


@pytest.mark.gpu
@needs_gpu
def test_bf16_gradients_are_off_by_little_more_than_their_own_rounding() -> None:
    h, weight = draw(T=1000, D=256, E=64, dtype=torch.bfloat16)
    dlogits = torch.randn(1000, 64, device=DEVICE) * 1e-4
    dh = kernel._gradient_of_h(dlogits, weight, torch.bfloat16)
    dweight = kernel._gradient_of_weight(dlogits, h, torch.bfloat16)
    for actual, exact in ((dh, dlogits.double() @ weight.double()), (dweight, dlogits.double().T @ h.double())):
        assert actual.dtype == torch.bfloat16
        assert rel_err(actual, exact) <= 1.02 * rel_err(exact.bfloat16(), exact)


# The operators ----------------------------------------------------------------------------------------------------


def test_the_operators_are_fit_for_compilation() -> None:
    h, weight = (x.requires_grad_() for x in draw(T=5))
    torch.library.opcheck(kernel._forward.op, (h, weight, 3, 4, 2, False, 2.0))
    scores, experts, gates, _ = (x.detach() for x in kernel.route(h, weight, experts_per_token=3))
    torch.library.opcheck(kernel._backward.op, (scores, experts, gates, scores, None, False, 1.0))
    torch.library.opcheck(kernel._backward.op, (scores, experts, gates, None, gates, True, 1.0))


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(24)}, r"h has shape \(24,\), expected \(any, any\)"),
        ({"weight": torch.zeros(16, 23)}, r"weight has shape \(16, 23\), expected \(any, 24\)"),
        ({"weight": torch.zeros(16, 24, device="meta")}, "weight is on meta, h on cpu"),
        ({"num_groups": 3}, "num_groups is 3, expected a divisor of the 16 experts"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 4, "groups_per_token": 5}, "groups_per_token is 5, expected 1 to num_groups=4"),
        ({"experts_per_token": 17}, "experts_per_token is 17, expected 1 to 16"),
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"num_groups": 4, "groups_per_token": 1, "experts_per_token": 5}, "expected 1 to 4, the eligible experts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_match_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"h": torch.zeros(5, 24), "weight": torch.zeros(16, 24), "experts_per_token": 3}
    with pytest.raises(ValueError, match=message):
        room.route(**(arguments | change))


def test_the_kernel_refuses_more_experts_than_it_can_hold() -> None:
    with pytest.raises(ValueError, match="weight has 257 experts, expected at most 256"):
        kernel.route(torch.zeros(1, 8), torch.zeros(257, 8), experts_per_token=1)
