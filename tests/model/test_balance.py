"""The three balance losses of section 2.2.3: values, scope, gradients; load statistics."""

from __future__ import annotations

import pytest
import torch

from dsv2.config.run import TrainConfig
from dsv2.model.balance import balance_losses, devices_per_token, expert_load
from dsv2.model.context import Routing
from tests.model.routers import grouped_config, moe_config, random_routing, route_logits
from tests.numerics import assert_close
from tests.paper import paper

NO_COUNTS = torch.empty(0)  # the balance losses count per sequence by themselves


def balanced_routing(num_tokens: int, E: int, A: int) -> Routing:
    """Every expert chosen equally often, equal probabilities; neighbouring choices are E / A experts apart."""
    experts_TA = (torch.arange(num_tokens)[:, None] + torch.arange(A) * (E // A)) % E
    return Routing(torch.full((num_tokens, E), 1 / E), experts_TA, torch.full((num_tokens, A), 1 / E), NO_COUNTS)


def expert_loss(routing: Routing, num_sequences: int = 1) -> float:
    return balance_losses(routing, num_sequences)[0].item()


def by_the_paper(routing: Routing, rows: slice, num_groups: int, groups_per_token: int) -> list[float]:
    """Equations 23 to 31 of one sequence in float64, with alphas of 1."""
    scores = routing.scores_TE[rows].double().numpy()
    chosen = [set(row) for row in routing.experts_TA[rows].tolist()]
    return [
        paper.expert_balance_loss(scores, chosen, 1.0),
        paper.device_balance_loss(scores, chosen, num_groups, 1.0),
        paper.communication_balance_loss(scores, chosen, num_groups, groups_per_token, 1.0),
    ]


# Values -----------------------------------------------------------------------------------------------------------


def test_at_perfect_balance_the_weighted_losses_are_the_papers_alphas() -> None:
    # V2's layer: 160 experts on 8 devices; every token has two experts on each of three neighbouring devices.
    first_T1 = torch.arange(0, 160, 2)[:, None]
    experts_TA = (first_T1 + torch.tensor([0, 1, 20, 21, 40, 41])) % 160
    routing = Routing(torch.full((80, 160), 1 / 160), experts_TA, torch.empty(80, 6), NO_COUNTS)
    assert devices_per_token(routing, 8).item() == 3
    alphas = TrainConfig(steps=1, batch_sequences=1, lr_peak=1.0).balance_alphas
    weighted = balance_losses(routing, 1, 8, 3) * torch.tensor(alphas)
    assert weighted.tolist() == pytest.approx([0.003, 0.05, 0.02], rel=1e-6)


@pytest.mark.parametrize(("E", "A"), [(8, 2), (160, 4), (4, 1)])
def test_the_expert_loss_is_one_at_perfect_balance(E: int, A: int) -> None:
    assert expert_loss(balanced_routing(E, E, A)) == pytest.approx(1.0, rel=1e-6)


def test_a_collapsed_router_costs_as_many_times_more_as_experts_and_devices_lie_idle() -> None:
    routing = route_logits([[50.0] + [0.0] * 7] * 4, grouped_config(experts_per_token=1, groups_per_token=1))
    assert balance_losses(routing, 1, 4, 1).tolist() == pytest.approx([8.0, 4.0, 4.0], rel=1e-5)


def test_tokens_that_reach_fewer_devices_than_they_may_cost_less_communication() -> None:
    # Two experts of one device each: half of what two devices a token would cost, and as well balanced.
    experts_TA = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    routing = Routing(torch.full((4, 8), 1 / 8), experts_TA, torch.empty(4, 2), NO_COUNTS)
    assert balance_losses(routing, 1, 4, 2).tolist() == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("num_sequences", [1, 2, 5])
def test_the_losses_are_the_papers_sums_per_sequence_averaged(num_sequences: int) -> None:
    routing = random_routing(grouped_config(), 40)
    length = 40 // num_sequences
    sequences = [slice(i * length, (i + 1) * length) for i in range(num_sequences)]
    each = [by_the_paper(routing, rows, 4, 2) for rows in sequences]
    expected = [sum(losses) / num_sequences for losses in zip(*each, strict=True)]
    assert max(abs(x - 1) for x in expected) > 0.05
    assert balance_losses(routing, num_sequences, 4, 2).tolist() == pytest.approx(expected, rel=1e-5)


def test_balance_within_a_batch_does_not_hide_imbalance_within_its_sequences() -> None:
    # One sequence always picks expert 0, the other always expert 1.
    logits = [[9.0, 0.0]] * 4 + [[0.0, 9.0]] * 4
    routing = route_logits(logits, moe_config(num_experts=2, experts_per_token=1))
    assert balance_losses(routing, 1, 2, 1).tolist() == pytest.approx([1.0] * 3, rel=1e-3)
    assert balance_losses(routing, 2, 2, 1).tolist() == pytest.approx([2.0] * 3, rel=1e-3)


def test_one_device_is_always_in_balance() -> None:
    scores_TE = random_routing(moe_config(), 20).scores_TE.clone().requires_grad_()
    routing = Routing(scores_TE, scores_TE.detach().topk(2, dim=1).indices, torch.empty(20, 2), NO_COUNTS)
    losses = balance_losses(routing, 1)
    assert losses[1:].tolist() == [1.0, 1.0]
    losses[1:].sum().backward()
    assert scores_TE.grad is not None
    assert not scores_TE.grad.any()


def test_sequences_that_do_not_divide_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="40 tokens do not divide into num_sequences=3"):
        balance_losses(random_routing(moe_config(), 40), 3)


# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2], ids=["expert", "device", "communication"])
def test_the_gradient_flows_through_the_probabilities_alone(which: int) -> None:
    """Of a mean over T tokens it is f / T, the same for every token; on one device the same for every expert."""
    T, E, A, G, M = 20, 8, 3, 4, 2
    scores_TE = random_routing(grouped_config(), T).scores_TE.clone().requires_grad_()
    experts_TA = random_routing(grouped_config(), T, seed=1).experts_TA
    routing = Routing(scores_TE, experts_TA, torch.empty(T, A), NO_COUNTS)
    balance_losses(routing, 1, G, M)[which].backward()
    counts_E = torch.bincount(experts_TA.flatten(), minlength=E).double()
    sent_G = torch.tensor([sum(g in {e // 2 for e in row} for row in experts_TA.tolist()) for g in range(G)]).double()
    f_E = counts_E * E / (A * T)
    f_device_E = f_E.view(G, -1).mean(1).repeat_interleave(E // G)
    f_sent_E = (sent_G * G / (M * T)).repeat_interleave(E // G)
    assert scores_TE.grad is not None
    assert_close(scores_TE.grad, ((f_E, f_device_E, f_sent_E)[which] / T).expand(T, E))


# Statistics -------------------------------------------------------------------------------------------------------


def test_expert_load_is_the_share_of_rows() -> None:
    routing = route_logits([[5.0, 4.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0]], moe_config(num_experts=4))
    assert expert_load(routing).tolist() == [0.5, 0.25, 0.25, 0.0]


def test_a_token_is_sent_to_a_device_once_however_many_experts_it_has_there() -> None:
    # Experts 0 and 1 are on one device, 0 and 2 on two.
    routing = route_logits([[5.0, 4.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0]], moe_config(num_experts=4))
    assert devices_per_token(routing, 2).item() == 1.5
