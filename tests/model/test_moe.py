"""DeepSeekMoE: which experts are chosen, with what gates, and what they compute."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dsv2.config import ModelConfig
from dsv2.model import Context
from dsv2.model.moe import Experts, route
from tests.model.routers import moe_config, random_routing, route_logits
from tests.numerics import GRADIENT_BUDGETS, assert_close, mla_config, random_model, random_tokens, rel_err

# Choice -----------------------------------------------------------------------------------------------------------


def test_the_best_experts_are_chosen_best_first() -> None:
    routing = route_logits([[0.0, 3.0, 1.0, 2.0, -1.0, 0.0, 0.0, 0.0]], moe_config(experts_per_token=3))
    assert routing.experts_TA.tolist() == [[1, 3, 2]]


def test_a_group_scores_its_maximum_and_not_its_sum() -> None:
    # Group 0 holds the single best expert; groups 1 and 2 have larger sums of two.
    moe = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=1)
    routing = route_logits([[3.0, -9.0, 2.9, 2.9, 2.8, 2.8, 0.0, 0.0]], moe)
    assert routing.experts_TA.tolist() == [[0, 1]]


def test_experts_outside_the_best_groups_are_out_of_reach() -> None:
    moe = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=2, experts_per_token=4)
    routing = route_logits([[5.0, -5.0, 1.0, 1.0, 4.0, -6.0, 2.0, 2.0]], moe)
    assert routing.experts_TA.tolist() == [[0, 4, 1, 5]]


def test_an_ineligible_expert_is_never_chosen_although_eligible_ones_have_no_probability() -> None:
    # exp(-200) is 0 in fp32: masking with 0 instead of -inf would make these a tie.
    moe = moe_config(router="group_limited_greedy", num_groups=2, groups_per_token=1, experts_per_token=4)
    routing = route_logits([[1.0, 1.0, 1.0, 1.0, 200.0, 0.0, 0.0, 0.0]], moe)
    assert sorted(routing.experts_TA[0].tolist()) == [4, 5, 6, 7]


@pytest.mark.parametrize("groups_per_token", [1, 2, 3])
def test_group_limited_routing_touches_at_most_its_groups(groups_per_token: int) -> None:
    moe = moe_config(
        num_experts=32,
        experts_per_token=4,
        router="group_limited_greedy",
        num_groups=8,
        groups_per_token=groups_per_token,
    )
    groups_TA = random_routing(moe, 200).experts_TA // 4
    assert max(len(set(row)) for row in groups_TA.tolist()) == groups_per_token


def test_a_limit_of_all_groups_is_no_limit() -> None:
    limited = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=4)
    assert torch.equal(random_routing(limited).experts_TA, random_routing(moe_config()).experts_TA)


def test_a_tie_goes_to_the_lowest_index() -> None:
    moe = moe_config(num_experts=64, experts_per_token=6)
    routing = route_logits([[0.0] * 64, [0.0] * 32 + [1.0] * 32], moe)
    assert routing.experts_TA.tolist() == [[0, 1, 2, 3, 4, 5], [32, 33, 34, 35, 36, 37]]


def test_a_tie_of_groups_goes_to_the_lowest_index() -> None:
    moe = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=2, experts_per_token=4)
    assert route_logits([[0.0, 1.0] * 4], moe).experts_TA.tolist() == [[1, 3, 0, 2]]


# Gates ------------------------------------------------------------------------------------------------------------


def test_gates_are_the_probabilities_over_all_experts() -> None:
    routing = random_routing(moe_config())
    assert torch.equal(routing.gates_TA, routing.scores_TE.gather(1, routing.experts_TA))
    assert_close(routing.scores_TE.sum(1), torch.ones(65))


def test_gates_of_v2_sum_to_less_than_one() -> None:
    moe = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=2)
    sums_T = random_routing(moe).gates_TA.sum(1)
    assert sums_T.max().item() < 1.0
    assert sums_T.min().item() < 0.5


def test_a_group_limit_does_not_change_the_probabilities() -> None:
    limited = moe_config(router="group_limited_greedy", num_groups=4, groups_per_token=1)
    assert torch.equal(random_routing(limited).scores_TE, random_routing(moe_config()).scores_TE)


def test_routed_scaling_multiplies_the_gates() -> None:
    plain, scaled = random_routing(moe_config()), random_routing(moe_config(routed_scaling_factor=16.0))
    assert torch.equal(scaled.gates_TA, 16.0 * plain.gates_TA)


def test_renormalised_gates_sum_to_one_and_are_not_scaled() -> None:
    # GShard and Mixtral; the official code scales only where it does not renormalise.
    routing = random_routing(moe_config(norm_topk_prob=True, routed_scaling_factor=16.0))
    assert_close(routing.gates_TA.sum(1), torch.ones(65))


def test_renormalised_gates_are_the_softmax_over_the_chosen_logits() -> None:
    logits = [[0.3, 2.0, -1.0, 1.5, 0.0, 0.1, 0.2, -0.5]]
    routing = route_logits(logits, moe_config(norm_topk_prob=True))
    assert_close(routing.gates_TA, torch.tensor([[2.0, 1.5]]).softmax(-1))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_only_expert_of_switch_keeps_its_probability(norm_topk_prob: bool) -> None:
    routing = random_routing(moe_config(experts_per_token=1, norm_topk_prob=norm_topk_prob))
    assert torch.equal(routing.gates_TA[:, 0], routing.scores_TE.amax(1))


def test_routing_is_computed_in_fp32() -> None:
    h_TD, weight_ED = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (33, 8))
    low, high = route(h_TD, weight_ED, moe_config()), route(h_TD.float(), weight_ED.float(), moe_config())
    assert low.scores_TE.dtype == low.gates_TA.dtype == torch.float32
    assert torch.equal(low.gates_TA, high.gates_TA)


# Experts ----------------------------------------------------------------------------------------------------------


def loop_over_experts(
    x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts_TA: torch.Tensor, gates_TA: torch.Tensor
) -> torch.Tensor:
    """Equation 20 as it stands, token by token."""
    rows = []
    for x_D, experts_A, gates_A in zip(x_TD, experts_TA.tolist(), gates_TA, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, g in zip(experts_A, gates_A, strict=True):
            gate_F, up_F = (gate_up[e] @ x_D).chunk(2)
            y_D = y_D + g * (down[e] @ (F.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows)


def some_experts(choice: str, T: int, E: int, A: int) -> torch.Tensor:
    if choice == "random":
        generator = torch.Generator().manual_seed(3)
        return torch.stack([torch.randperm(E, generator=generator)[:A] for _ in range(T)])
    if choice == "one-expert-takes-all":
        return torch.full((T, 1), 2)
    return torch.tensor([[4, 1]]).expand(T, 2)  # the others have none


@pytest.mark.parametrize("choice", ["random", "one-expert-takes-all", "most-have-none"])
def test_experts_equal_a_loop_over_them_in_values_and_gradients(choice: str) -> None:
    T, D, E, width = 33, 24, 5, 16
    generator = torch.Generator().manual_seed(0)
    experts = Experts(E, D, width)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    chosen_TA = some_experts(choice, T, E, 2)
    x_TD = torch.randn(T, D, generator=generator, requires_grad=True)
    gates_TA = torch.rand(chosen_TA.shape, generator=generator, requires_grad=True)
    inputs = (x_TD, experts.gate_up_proj, experts.down_proj, gates_TA)
    cotangent_TD = torch.randn(T, D, generator=generator)

    out_TD = experts(x_TD, chosen_TA, gates_TA)
    found = torch.autograd.grad(out_TD, inputs, cotangent_TD)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected_TD = loop_over_experts(exact[0], exact[1], exact[2], chosen_TA, exact[3])
    expected = torch.autograd.grad(expected_TD, exact, cotangent_TD.double())

    assert_close(out_TD, expected_TD)
    errors = [rel_err(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= GRADIENT_BUDGETS[torch.float32]


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    experts = Experts(4, 8, 8)
    for p in experts.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    experts(torch.ones(3, 8), torch.full((3, 1), 2), torch.ones(3, 1)).sum().backward()
    for p in experts.parameters():
        assert p.grad is not None
        assert [bool(g.any()) for g in p.grad] == [False, False, True, False]


@pytest.mark.parametrize(("D", "width"), [(10, 8), (8, 12)])
def test_widths_that_grouped_products_cannot_compute_are_refused(D: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"hidden_size={D} and moe.expert_intermediate_size={width} must be multiples"):
        Experts(3, D, width)


def test_the_shared_experts_see_every_token_ungated() -> None:
    # With routed experts silenced what remains is one SwiGLU of twice the width.
    cfg = mla_config()
    layer = random_model(cfg).model.layers[1]
    moe: Any = layer.mlp
    torch.nn.init.zeros_(moe.experts.down_proj)
    x_TD = torch.randn(9, cfg.hidden_size, generator=torch.Generator().manual_seed(0))
    assert moe.shared_experts.gate_proj.weight.shape == (64, cfg.hidden_size)
    assert torch.equal(moe(x_TD, Context.packed([0, 9])), moe.shared_experts(x_TD))


def test_every_moe_layer_reports_its_routing_and_dense_layers_none() -> None:
    cfg = mla_config()
    context = dataclasses.replace(Context.packed([0, 11]), routings=[])
    random_model(cfg)(random_tokens(cfg, 11), context=context)
    assert context.routings is not None
    assert [r.experts_TA.shape for r in context.routings] == [(11, 3)] * cfg.num_moe_layers
    assert cfg.num_moe_layers == cfg.num_layers - 1


def test_gradients_reach_the_router_through_the_gates() -> None:
    cfg = mla_config()
    model = random_model(cfg)
    model(random_tokens(cfg, 33)).sum().backward()
    gate = model.get_parameter("model.layers.1.mlp.gate.weight")
    assert gate.grad is not None
    assert gate.grad.norm().item() > 0


def test_a_moe_layer_without_shared_experts_has_no_such_weights() -> None:
    cfg = ModelConfig.preset("tiny")
    assert cfg.moe is not None
    cfg = cfg.replace(moe=dataclasses.replace(cfg.moe, num_shared_experts=0))
    assert not [n for n, _ in random_model(cfg).named_parameters() if "shared" in n]
