"""One optimizer step, against sums written out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.config.run import TrainConfig
from dsv2.data import IGNORED, Batch
from dsv2.kernels.cross_entropy import cross_entropy
from dsv2.model import Context, Transformer
from dsv2.model.balance import expert_load
from dsv2.model.context import Routing
from dsv2.train import step
from dsv2.train.optim import adamw, load_state_tensors, state_tensors
from dsv2.train.step import StepStats, exempt_sequences, max_over_mean, train_step
from tests.numerics import gqa_config, mla_config, random_model, rel_err

SEQUENCE = 12


def batch(num_sequences: int = 4, seed: int = 0, vocab_size: int = 512) -> Batch:
    """Sequences of two documents each, of which the first ends at another place in every sequence."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=(num_sequences, SEQUENCE))
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = IGNORED
    bounds = [0]
    for i in range(num_sequences):
        end = 3 + i % (SEQUENCE - 4)
        targets[i, end - 1] = IGNORED
        bounds += [i * SEQUENCE + end, (i + 1) * SEQUENCE]
    return Batch(tokens.reshape(-1), targets.reshape(-1), np.array(bounds, np.int32), np.arange(num_sequences))


def cut(whole: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The same sequences as several batches."""
    pieces, first = [], 0
    for size in sizes:
        rows = slice(first * SEQUENCE, (first + size) * SEQUENCE)
        bounds = whole.cu_seqlens[(whole.cu_seqlens >= rows.start) & (whole.cu_seqlens <= rows.stop)] - rows.start
        ids = whole.sequence_ids[first : first + size]
        pieces.append(Batch(whole.tokens[rows], whole.targets[rows], bounds, ids))
        first += size
    return pieces


def train_config(**changes: Any) -> TrainConfig:
    """Neither clipping, balance losses nor dropping unless asked for."""
    plain = {"steps": 1, "batch_sequences": 4, "lr_peak": 1.0, "grad_clip": 1e9}
    plain |= {
        "capacity_factor": math.inf,
        "expert_balance_alpha": 0.0,
        "device_balance_alpha": 0.0,
        "communication_balance_alpha": 0.0,
    }
    return TrainConfig(**(plain | changes))


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.named = dict(model.named_parameters())
        self.seen: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> None:
        self.seen = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.named.items()}


def gradients(model: Transformer, batches: list[Batch], train: TrainConfig) -> tuple[dict[str, Tensor], StepStats]:
    recorder = Recorder(model)
    stats = train_step(model, recorder, batches, train, lr=0.0)
    return recorder.seen, stats


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.fixture
def model() -> Transformer:
    return random_model(mla_config(yarn=False))


# Micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1)])
def test_micro_batches_add_up_to_the_whole_batch(model: Transformer, sizes: tuple[int, ...]) -> None:
    train = train_config(expert_balance_alpha=1.0)
    whole, stats = gradients(model, [batch()], train)
    pieces, piece_stats = gradients(model, cut(batch(), sizes), train)
    assert {name: e for name in whole if (e := rel_err(pieces[name], whole[name])) > 1e-5} == {}
    for key in ("loss", "grad_norm", "balance_losses_L3", "expert_load_LE", "devices_per_token_L"):
        assert rel_err(getattr(piece_stats, key), getattr(stats, key)) < 1e-6, key


def test_every_target_counts_the_same_however_few_its_micro_batch_has(model: Transformer) -> None:
    whole = batch()
    whole.targets[: 2 * SEQUENCE - 3] = IGNORED
    pieces, stats = gradients(model, cut(whole, (2, 2)), train_config())
    expected, _ = gradients(model, [whole], train_config())
    assert rel_err(flat(pieces), flat(expected)) < 1e-5
    logits = model(torch.from_numpy(whole.tokens), whole.cu_seqlens)
    mean = F.cross_entropy(logits, torch.from_numpy(whole.targets), ignore_index=IGNORED)
    assert rel_err(stats.loss, mean) < 1e-6


def test_weights_after_a_step_do_not_depend_on_micro_batches() -> None:
    models = [random_model(mla_config(yarn=False)) for _ in range(2)]
    before = flat(dict(models[0].named_parameters())).clone()
    train = train_config(expert_balance_alpha=0.003, grad_clip=1.0)
    for m, sizes in zip(models, [(4,), (1, 1, 1, 1)], strict=True):
        # With a large epsilon the first step is about as smooth as the gradient; without, it is the gradient's sign.
        optimizer = adamw(m, train_config(adam_eps=1.0))
        train_step(m, optimizer, cut(batch(), sizes), train, lr=1.0)
    moved = [flat(dict(m.named_parameters())) - before for m in models]
    assert moved[0].norm() > 0.1
    assert rel_err(moved[1], moved[0]) < 1e-5


# Cross-entropy ----------------------------------------------------------------------------------------------------


def test_cross_entropy_is_minus_the_log_of_the_targets_probability() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 2, 2, 3])
    by_hand = -sum(math.log(row.double().softmax(-1)[t]) for row, t in zip(logits, targets, strict=True))
    assert float(cross_entropy(logits, torch.eye(7), targets)) == pytest.approx(by_hand, rel=1e-6)


def test_cross_entropy_of_16_bit_logits_is_computed_in_32() -> None:
    logits = torch.zeros(1000, 8, dtype=torch.bfloat16)
    weight = torch.eye(8, dtype=torch.bfloat16)
    total = cross_entropy(logits, weight, torch.zeros(1000, dtype=torch.int64))
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(1000 * math.log(8), rel=1e-6)


def test_ignored_targets_add_nothing(model: Transformer) -> None:
    b = batch()
    found, stats = gradients(model, [b], train_config())
    logits = model(torch.from_numpy(b.tokens), b.cu_seqlens)
    kept = b.targets != IGNORED
    log_probs = logits[kept].log_softmax(-1)
    loss = -log_probs[range(kept.sum()), b.targets[kept]].mean()
    model.zero_grad()
    loss.backward()
    assert rel_err(stats.loss, loss) < 1e-6
    assert rel_err(flat(found), flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None})) < 1e-5


def test_a_batch_without_targets_moves_nothing(model: Transformer) -> None:
    b = batch()
    b.targets[:] = IGNORED
    found, stats = gradients(model, [b], train_config())
    assert float(stats.loss) == 0
    assert not flat(found).any()


# Clipping ---------------------------------------------------------------------------------------------------------


def test_a_large_gradient_is_scaled_to_the_limit(model: Transformer) -> None:
    raw, raw_stats = gradients(model, [batch()], train_config())
    clipped, stats = gradients(model, [batch()], train_config(grad_clip=1.0))
    norm = flat(raw).double().norm()
    assert norm > 1.5
    assert float(flat(clipped).norm()) == pytest.approx(1.0, rel=1e-4)
    assert rel_err(flat(clipped), flat(raw) / norm) < 1e-4
    assert float(stats.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert float(raw_stats.grad_norm) == pytest.approx(float(norm), rel=1e-5)


def test_a_small_gradient_is_left_alone(model: Transformer) -> None:
    raw, stats = gradients(model, [batch()], train_config())
    limit = 1.01 * float(stats.grad_norm)
    assert torch.equal(flat(gradients(model, [batch()], train_config(grad_clip=limit))[0]), flat(raw))


def test_no_gradient_is_left_for_the_next_step(model: Transformer) -> None:
    gradients(model, [batch()], train_config())
    assert all(p.grad is None for p in model.parameters())


def test_the_rate_of_the_step_reaches_every_group(model: Transformer) -> None:
    optimizer = adamw(model, train_config())
    train_step(model, optimizer, [batch()], train_config(), lr=0.0125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0125, 0.0125]


# Balance ----------------------------------------------------------------------------------------------------------


def balance_by_hand(model: Transformer, b: Batch) -> Tensor:
    """Equations 23 to 31 of every MoE layer and every sequence, in loops: [L, 3], mean over sequences."""
    context = Context.packed(b.cu_seqlens.tolist())
    context.routings = []
    model(torch.from_numpy(b.tokens), context=context)
    return torch.stack([layer_by_hand(routing, len(b.sequence_ids)) for routing in context.routings])


def layer_by_hand(routing: Routing, num_sequences: int, G: int = 4, M: int = 2) -> Tensor:
    E, A = routing.scores_TE.shape[1], routing.experts_TA.shape[1]
    total = torch.zeros(3)
    for i in range(num_sequences):
        rows = range(i * SEQUENCE, (i + 1) * SEQUENCE)
        chosen = [set(routing.experts_TA[t].tolist()) for t in rows]
        f = [sum(e in experts for experts in chosen) * E / (A * SEQUENCE) for e in range(E)]
        P = [torch.stack([routing.scores_TE[t, e] for t in rows]).mean() for e in range(E)]
        losses = [sum((f[e] * P[e] for e in range(E)), torch.zeros(())), torch.zeros(()), torch.zeros(())]
        for g in range(G):
            device = range(g * E // G, (g + 1) * E // G)
            sent = sum(bool(experts & set(device)) for experts in chosen) * G / (M * SEQUENCE)
            P_device = torch.stack([P[e] for e in device]).sum()
            losses[1] = losses[1] + sum(f[e] for e in device) / len(device) * P_device
            losses[2] = losses[2] + sent * P_device
        total = total + torch.stack(losses)
    return total / num_sequences


def test_the_balance_losses_are_those_of_each_sequence(model: Transformer) -> None:
    _, stats = gradients(model, [batch()], train_config())
    assert rel_err(stats.balance_losses_L3, balance_by_hand(model, batch())) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_balance_losses_are_weighted_by_their_alphas_and_added_up_over_layers(
    model: Transformer, which: int
) -> None:
    alpha = 100.0  # so that the difference of two gradients still shows it
    key = ("expert_balance_alpha", "device_balance_alpha", "communication_balance_alpha")[which]
    with_balance, _ = gradients(model, [batch()], train_config(**{key: alpha}))
    without, _ = gradients(model, [batch()], train_config())
    balance_by_hand(model, batch())[:, which].sum().backward()
    routers = [name for name in without if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    named = dict(model.named_parameters())
    for name in routers:
        grad = named[name].grad
        assert grad is not None
        assert rel_err(with_balance[name] - without[name], alpha * grad) < 1e-4, name


def test_the_loss_that_is_told_leaves_out_the_balance(model: Transformer) -> None:
    stats = [gradients(model, [batch()], train_config(expert_balance_alpha=a))[1] for a in (0.0, 100.0)]
    assert torch.equal(stats[0].loss, stats[1].loss)


def test_a_dense_model_has_neither_balance_nor_load() -> None:
    model = random_model(gqa_config("llama"))
    _, stats = gradients(model, [batch(vocab_size=model.cfg.vocab_size)], train_config(expert_balance_alpha=1.0))
    assert stats.balance_losses_L3.numel() == 0
    assert stats.expert_load_LE.numel() == 0


def test_the_load_of_every_layer_adds_up_to_one(model: Transformer) -> None:
    _, stats = gradients(model, cut(batch(), (1, 1, 2)), train_config())
    assert stats.expert_load_LE.shape == (2, 8)
    assert torch.allclose(stats.expert_load_LE.sum(1), torch.ones(2))
    assert (stats.expert_load_LE >= 0).all()


def test_the_busiest_expert_is_compared_with_the_mean_of_its_layer() -> None:
    load = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.3, 0.2]])
    assert max_over_mean(load).tolist() == pytest.approx([1.0, 1.6])


# Dropping ---------------------------------------------------------------------------------------------------------


def seen_dropping(model: Transformer, batches: list[Batch], train: TrainConfig) -> tuple[list[Routing], StepStats]:
    """What the MoE layers of a step decided, micro-batch after micro-batch."""
    seen: list[Routing] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "expert_load", lambda routing: seen.append(routing) or expert_load(routing))
        _, stats = gradients(model, batches, train)
    return seen, stats


def test_a_step_drops_rows_and_spares_exempt_sequences(model: Transformer) -> None:
    b = batch(num_sequences=40)
    routings, stats = seen_dropping(model, [b], train_config(capacity_factor=1.0))
    exempt_B = exempt_sequences(b.sequence_ids, 0.1)
    assert exempt_B.any()
    assert (stats.drop_rate_L > 0.01).all()
    for routing, rate in zip(routings, stats.drop_rate_L.tolist(), strict=True):
        assert routing.kept_TA is not None
        kept_BM = routing.kept_TA.view(len(exempt_B), -1)
        assert kept_BM[torch.from_numpy(exempt_B)].all()
        assert rate == pytest.approx(1 - kept_BM.float().mean().item(), rel=1e-5)


@pytest.mark.parametrize("capacity_factor", [4.0, math.inf])
def test_a_capacity_that_holds_every_row_drops_nothing(model: Transformer, capacity_factor: float) -> None:
    # A model of four devices: none gets more than four times the mean.
    routings, stats = seen_dropping(model, [batch()], train_config(capacity_factor=capacity_factor))
    assert all(routing.kept_TA is None for routing in routings)
    assert not stats.drop_rate_L.any()


def test_experts_that_are_not_limited_to_devices_drop_nothing() -> None:
    routings, _ = seen_dropping(random_model(mla_config(grouped=False)), [batch()], train_config(capacity_factor=1.0))
    assert len(routings) == 2
    assert all(routing.kept_TA is None for routing in routings)


def test_the_balance_losses_count_before_anything_is_dropped(model: Transformer) -> None:
    # In the first MoE layer; what the second gets has changed.
    (_, stats), (_, undropped) = (gradients(model, [batch()], train_config(capacity_factor=c)) for c in (0.5, math.inf))
    for key in ("balance_losses_L3", "expert_load_LE", "devices_per_token_L"):
        assert torch.equal(getattr(stats, key)[0], getattr(undropped, key)[0]), key
    assert stats.drop_rate_L[0] > 0.3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_about_the_asked_share_of_sequences_is_exempt(share: float) -> None:
    assert exempt_sequences(np.arange(100_000), share).mean() == pytest.approx(share, abs=0.003)


def test_the_exempt_sequences_never_change() -> None:
    # Runs resume under other versions: these ids are exempt for good.
    assert np.flatnonzero(exempt_sequences(np.arange(80), 0.1)).tolist() == [10, 18, 21, 41, 48, 68]


def test_whether_a_sequence_is_exempt_depends_on_its_id_alone() -> None:
    ids = np.random.default_rng(0).permutation(1000)
    together = exempt_sequences(ids, 0.1)
    alone = [exempt_sequences(ids[i : i + 1], 0.1)[0] for i in range(len(ids))]
    assert together.tolist() == alone


# AdamW ------------------------------------------------------------------------------------------------------------


def test_weight_decay_shrinks_matrices_and_spares_gains(model: Transformer) -> None:
    optimizer = adamw(model, train_config(weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.1) if p.dim() > 1 else before[name]
        assert torch.allclose(p, expected, rtol=1e-6), name
    assert {p.dim() for p in model.parameters()} == {1, 2, 3}


def test_adamw_takes_the_recipes_constants(model: Transformer) -> None:
    optimizer = adamw(model, train_config(beta1=0.8, beta2=0.9, adam_eps=1e-6, weight_decay=0.2))
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, decay)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_optimizer_state_by_name_restores_the_optimizer(model: Transformer) -> None:
    twin = random_model(mla_config(yarn=False))
    optimizers = [adamw(m, train_config()) for m in (model, twin)]
    train_step(model, optimizers[0], [batch()], train_config(), lr=1e-2)
    twin.load_state_dict(model.state_dict())
    load_state_tensors(twin, optimizers[1], state_tensors(model, optimizers[0]))
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        train_step(m, optimizer, [batch(seed=1)], train_config(), lr=1e-2)
    assert torch.equal(flat(dict(model.named_parameters())), flat(dict(twin.named_parameters())))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_optimizer_state_that_does_not_fit_is_named(model: Transformer, change: str) -> None:
    optimizer = adamw(model, train_config())
    train_step(model, optimizer, [batch()], train_config(), lr=1e-2)
    tensors = state_tensors(model, optimizer)
    name = "exp_avg_sq/model.norm.weight"
    tensors[name] = tensors[name][:3]
    if change == "missing":
        del tensors[name]
    with pytest.raises(ValueError, match=f"{name} .* expected shape \\(64,\\)"):
        load_state_tensors(model, optimizer, tensors)
