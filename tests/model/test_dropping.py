"""Token dropping: the lowest affinities of each device go, exempt tokens stay, and only a training step drops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2.engine.generate import generate
from dsv2.kernels.grouped_mlp import grouped_mlp
from dsv2.model import Context
from dsv2.model.context import Dropping, Routing
from dsv2.model.dropping import drop_rate, drop_rows
from dsv2.model.moe import Experts
from tests.model.routers import grouped_config, random_routing
from tests.numerics import GRADIENT_BUDGETS, assert_close, mla_config, random_model, rel_err

E = 8


def drawn(seed: int, T: int, A: int) -> Routing:
    """Scores from few values, so that many are equal; experts at random."""
    rng = np.random.default_rng(seed)
    scores_TE = torch.from_numpy(rng.integers(1, 6, size=(T, E)) / 8).float()
    experts_TA = torch.from_numpy(np.array([rng.permutation(E)[:A] for _ in range(T)]))
    return Routing(scores_TE, experts_TA, 16 * scores_TE.gather(1, experts_TA), torch.empty(0))


def exempt(seed: int, T: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(T) < 0.3)


def none_exempt(T: int) -> Tensor:
    return torch.zeros(T, dtype=torch.bool)


def kept(routing: Routing) -> Tensor:
    assert routing.kept_TA is not None
    return routing.kept_TA


def kept_by_hand(routing: Routing, factor: float, exempt_T: Tensor, num_groups: int) -> list[list[bool]]:
    """Section 2.2.4 in loops: from each device the lowest affinity goes, of equal ones the last, until it has room."""
    T, A = routing.experts_TA.shape
    remaining = [[True] * A for _ in range(T)]
    for device in range(num_groups):
        rows = []
        for t, experts in enumerate(routing.experts_TA.tolist()):
            for a, e in enumerate(experts):
                if e // (E // num_groups) == device:
                    rows.append((routing.scores_TE[t, e].item(), -t, -a))
        excess = len(rows) - math.ceil(factor * T * A / num_groups)
        for _, t, a in sorted(row for row in rows if not exempt_T[-row[1]])[: max(excess, 0)]:
            remaining[-t][-a] = False
    return remaining


ROUTINGS = given(
    seed=st.integers(0, 2**32 - 1),
    T=st.integers(1, 24),
    A=st.integers(1, 4),
    num_groups=st.sampled_from([1, 2, 4, 8]),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25]),
)
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)


# Which rows go ----------------------------------------------------------------------------------------------------


@EXAMPLES
@ROUTINGS
def test_what_stays_is_what_the_papers_rule_leaves(seed: int, T: int, A: int, num_groups: int, factor: float) -> None:
    routing, exempt_T = drawn(seed, T, A), exempt(seed, T)
    dropped = drop_rows(routing, Dropping(factor, exempt_T), num_groups)
    expected = kept_by_hand(routing, factor, exempt_T, num_groups)
    assert kept(dropped).tolist() == expected
    assert drop_rate(dropped).item() == pytest.approx(1 - np.mean(expected), abs=1e-6)


@EXAMPLES
@ROUTINGS
def test_rows_of_exempt_tokens_all_stay(seed: int, T: int, A: int, num_groups: int, factor: float) -> None:
    exempt_T = exempt(seed, T)
    assert kept(drop_rows(drawn(seed, T, A), Dropping(factor, exempt_T), num_groups))[exempt_T].all()


@EXAMPLES
@ROUTINGS
def test_no_row_goes_while_one_of_lower_affinity_stays(
    seed: int, T: int, A: int, num_groups: int, factor: float
) -> None:
    routing, exempt_T = drawn(seed, T, A), exempt(seed, T)
    kept_TA = kept(drop_rows(routing, Dropping(factor, exempt_T), num_groups))
    affinity_TA = routing.scores_TE.gather(1, routing.experts_TA)
    for device in range(num_groups):
        there_TA = (routing.experts_TA // (E // num_groups) == device) & ~exempt_T[:, None]
        gone, left = affinity_TA[there_TA & ~kept_TA], affinity_TA[there_TA & kept_TA]
        assert not len(gone) or not len(left) or gone.max() <= left.min()


@EXAMPLES
@ROUTINGS
def test_a_device_is_filled_to_its_capacity_and_no_further(
    seed: int, T: int, A: int, num_groups: int, factor: float
) -> None:
    routing = drawn(seed, T, A)
    kept_TA = kept(drop_rows(routing, Dropping(factor, none_exempt(T)), num_groups))
    capacity = math.ceil(factor * T * A / num_groups)
    groups_TA = routing.experts_TA // (E // num_groups)
    sent, computed = (torch.bincount(g, minlength=num_groups) for g in (groups_TA.flatten(), groups_TA[kept_TA]))
    assert computed.tolist() == sent.clamp(max=capacity).tolist()


def test_of_equal_affinities_the_first_rows_stay() -> None:
    routing = Routing(torch.full((6, 2), 0.5), torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.empty(0))
    dropped = drop_rows(routing, Dropping(1.0, none_exempt(6)), num_groups=2)
    assert kept(dropped).flatten().tolist() == [True] * 3 + [False] * 3


def test_exempt_tokens_take_the_room_of_better_ones() -> None:
    scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    routing = Routing(scores_TE, torch.zeros(4, 1, dtype=torch.int64), scores_TE[:, :1], torch.empty(0))
    dropped = drop_rows(routing, Dropping(1.0, torch.tensor([False, False, True, True])), num_groups=2)
    assert kept(dropped).flatten().tolist() == [False, False, True, True]


def test_perfect_balance_drops_nothing_even_where_loads_cannot_be_equal() -> None:
    experts_TA = torch.tensor([[0], [2], [4], [6], [1]])
    routing = Routing(torch.full((5, E), 1 / E), experts_TA, torch.ones(5, 1), torch.empty(0))
    assert kept(drop_rows(routing, Dropping(1.0, none_exempt(5)), num_groups=4)).all()


# What that changes ------------------------------------------------------------------------------------------------


def test_a_dropped_row_has_gate_zero_and_the_others_keep_theirs() -> None:
    routing = random_routing(grouped_config(routed_scaling_factor=16.0))
    dropped = drop_rows(routing, Dropping(0.5, none_exempt(65)), num_groups=4)
    assert 0.2 < drop_rate(dropped).item() < 0.9
    assert torch.equal(dropped.gates_TA, routing.gates_TA * kept(dropped))
    assert torch.equal(dropped.experts_TA, routing.experts_TA)
    assert torch.equal(dropped.block_counts, routing.block_counts)


def test_a_dropped_row_leaves_no_trace_in_output_and_gradients() -> None:
    """Against the sum over the rows that stayed, in float64."""
    T, D, width = 33, 16, 8
    generator = torch.Generator().manual_seed(0)
    experts = Experts(E, D, width)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    x_TD, cotangent_TD = (torch.randn(T, D, generator=generator) for _ in range(2))
    scores_TE = random_routing(grouped_config(), T).scores_TE
    leaves = [x_TD, scores_TE, experts.gate_up_proj, experts.down_proj]

    def gradients(compute: Any, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out_TD = compute(*inputs)
        return out_TD, torch.autograd.grad(out_TD, inputs, cotangent_TD.to(dtype))

    experts_TA = random_routing(grouped_config(), T).experts_TA
    dropping = Dropping(0.5, exempt(0, T))
    kept_TA = kept(drop_rows(Routing(scores_TE, experts_TA, torch.ones(T, 3), torch.empty(0)), dropping, 4))

    def ours(x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = drop_rows(Routing(scores, experts_TA, scores.gather(1, experts_TA), torch.empty(0)), dropping, 4)
        return grouped_mlp(x, experts_TA, routing.gates_TA, gate_up, down)

    def by_hand(x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = []
        for t in range(T):
            out_D = torch.zeros(D, dtype=x.dtype)
            for e in experts_TA[t][kept_TA[t]].tolist():
                gate_F, up_F = (gate_up[e] @ x[t]).chunk(2)
                out_D = out_D + scores[t, e] * (down[e] @ (torch.nn.functional.silu(gate_F) * up_F))
            rows.append(out_D)
        return torch.stack(rows)

    out_TD, found = gradients(ours, torch.float32)
    expected_TD, expected = gradients(by_hand, torch.float64)
    assert_close(out_TD, expected_TD)
    errors = [rel_err(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= GRADIENT_BUDGETS[torch.float32]
    gone_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, experts_TA, ~kept_TA)
    assert gone_TE.any()
    assert not found[1][gone_TE].any()


def test_a_layer_drops_only_where_the_context_says_so() -> None:
    cfg = mla_config()
    layer: Any = random_model(cfg).model.layers[1].mlp
    x_TD = torch.randn(33, cfg.hidden_size, generator=torch.Generator().manual_seed(0))
    plain, limited = (Context.packed([0, 33]) for _ in range(2))
    plain.routings, limited.routings = [], []
    limited.dropping = Dropping(0.5, none_exempt(33))
    for context in (plain, limited):
        layer(x_TD, context)
    assert plain.routings[0].kept_TA is None
    assert drop_rate(plain.routings[0]).item() == 0
    assert drop_rate(limited.routings[0]).item() > 0.4


def test_generation_never_drops_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("dsv2.model.moe.drop_rows", lambda *arguments: asked.append(arguments))
    generate(random_model(mla_config()).train(), [[5, 6, 7], [8]], max_new_tokens=2)
    assert asked == []


def test_a_token_all_of_whose_rows_are_dropped_still_has_the_shared_experts() -> None:
    cfg = mla_config()
    layer: Any = random_model(cfg).model.layers[1].mlp
    x_TD = torch.randn(33, cfg.hidden_size, generator=torch.Generator().manual_seed(0))
    context = Context.packed([0, 33])
    context.routings, context.dropping = [], Dropping(0.1, none_exempt(33))
    out_TD = layer(x_TD, context)
    alone_T = ~kept(context.routings[0]).any(1)
    assert alone_T.any()
    assert torch.equal(out_TD[alone_T], layer.shared_experts(x_TD)[alone_T])
