"""sample beyond parity: distributions, which tokens can be drawn, ties, independence of rows, broken logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv2.kernels.case import Maker
from dsv2.kernels.sample import kernel, reference, sample
from dsv2.kernels.sample.cases import ROWS, Row, parameters, penalties

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32_MAX = torch.finfo(torch.float32).max


def rows(num_rows: int, **row: float) -> dict[str, Tensor]:
    """Equal parameters for so many rows, each with a seed of its own."""
    limits = parameters(Maker.seeded(0, DEVICE), (row,) * num_rows)
    return limits | {"seed": torch.arange(num_rows, device=DEVICE), "step": torch.zeros_like(limits["step"])}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Maker.seeded(seed, DEVICE).normal(*shape, std=2.0)


def chi_square(ids: Tensor, probs_W: Tensor) -> float:
    expected = probs_W.double() * len(ids)
    counts = torch.bincount(ids, minlength=len(probs_W))
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected).square() / expected).sum())


# Random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_words_published_with_it(word: int, expected: list[int]) -> None:
    x = torch.tensor([word])
    assert [int(w) for w in reference.philox((x,) * 4, (x, x))] == expected


def test_noise_is_gumbel() -> None:
    noise = reference.gumbel(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 1000).flatten()
    # P(x < t) = exp(-exp(-t)); a million draws stay within five standard deviations.
    for t in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0):
        p = math.exp(-math.exp(-t))
        assert abs((noise < t).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / len(noise))


def test_seeds_and_steps_give_streams_of_their_own() -> None:
    seeds = torch.tensor([0, 1, -1, 2**32, 0, 0])
    steps = torch.tensor([0, 0, 0, 0, 1, 2**32])
    bits = reference.random_bits(seeds, steps, 1000)
    assert len(bits.unique()) > 0.999 * bits.numel()


# Which tokens are drawn, and how often ----------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "num_kept"), [(1.0, 11), (0.5, 11), (2.0, 5)])
def test_draws_are_distributed_as_the_softmax_of_what_is_kept(temperature: float, num_kept: int) -> None:
    logits = normal(11)
    sorted_W, order_W = (logits / temperature).softmax(-1).sort(descending=True)
    sorted_W[num_kept:] = 0
    probs = torch.empty_like(sorted_W).scatter_(0, order_W, sorted_W / sorted_W.sum())
    limits = rows(20_000, temperature=temperature, top_k=num_kept)
    ids, _ = reference.sample(logits.expand(20_000, -1), **limits)
    # With ten degrees of freedom, 36 is exceeded once in ten thousand.
    assert chi_square(ids, probs) < 36
    some = {name: x[:30] for name, x in limits.items()}
    assert torch.equal(kernel.sample(logits.expand(30, -1), **some)[0], ids[:30])


def test_draws_of_successive_steps_are_distributed_as_the_softmax() -> None:
    logits = normal(11)
    limits = rows(20_000) | {"step": torch.arange(20_000, device=DEVICE), "seed": torch.full((20_000,), 7).to(DEVICE)}
    assert chi_square(reference.sample(logits.expand(20_000, -1), **limits)[0], logits.softmax(-1)) < 36


def kept_by_hand(logits: list[float], temperature: float, top_k: float, top_p: float, min_p: float) -> set[int]:
    """One token at a time, from the most probable on."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = [i for i in order if weights[i] >= min_p]
    order = order[: int(top_k)] if top_k else order
    total, mass, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if kept and mass >= top_p * total:
            break
        kept.add(i)
        mass += weights[i]
    return kept


LIMITS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 13},
    {"top_k": 12},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.6},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.75},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_exactly_the_tokens_that_a_sort_keeps_are_drawn(limits: dict[str, float], tied: bool) -> None:
    # At temperature 20 the 12 tokens are about equally probable; 120 draws miss none of them.
    logits = normal(12) * 5
    logits = (logits / 8).round() * 8 if tied else logits
    row = {"temperature": 20.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits
    expected = kept_by_hand(logits.tolist(), **row)
    limits_B = rows(120, **row)
    ids, _ = reference.sample(logits.expand(120, -1), **limits_B)
    assert set(ids.tolist()) == expected
    some = {name: x[:2] for name, x in limits_B.items()}
    assert torch.equal(kernel.sample(logits.expand(2, -1), **some)[0], ids[:2])


def test_top_k_1_and_a_tiny_top_p_are_greedy_whatever_the_noise() -> None:
    logits = normal(3, 1000)
    for limits in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        ids, _ = kernel.sample(logits, **rows(3, temperature=1e6, **limits))
        assert torch.equal(ids, logits.argmax(-1))


# Rows -------------------------------------------------------------------------------------------------------------


FEW_ROWS = ROWS[1::3]
"""Greedy, each limit alone, and all together."""


@pytest.mark.parametrize(
    ("some", "penalised"),
    [
        pytest.param(ROWS, False, marks=pytest.mark.slow, id="plain"),
        pytest.param(ROWS, True, marks=pytest.mark.slow, id="penalised"),
        pytest.param(FEW_ROWS, True, id="few-penalised"),
    ],
)
def test_a_row_draws_the_same_alone_and_in_any_batch(some: tuple[Row, ...], penalised: bool) -> None:
    maker = Maker.seeded(0, DEVICE)
    B = len(some)
    inputs = {"logits": normal(B, 300)} | parameters(maker, some) | (penalties(maker, B, 300) if penalised else {})
    ids, log_probs = kernel.sample(**inputs)
    order = torch.arange(B - 1, -1, -1, device=DEVICE)
    alone = [kernel.sample(**{name: x[i : i + 1] for name, x in inputs.items()}) for i in range(B)]
    for other_ids, other_log_probs in (
        [x[order] for x in kernel.sample(**{name: x[order] for name, x in inputs.items()})],
        [torch.cat(x) for x in zip(*alone, strict=True)],
    ):
        assert torch.equal(other_ids, ids)
        assert torch.equal(other_log_probs, log_probs)


@pytest.mark.parametrize(
    ("segment", "block", "some"),
    [
        pytest.param(64, 1024, ROWS, marks=pytest.mark.slow, id="64-1024"),
        pytest.param(256, 256, ROWS, marks=pytest.mark.slow, id="256-256"),
        pytest.param(256, 256, FEW_ROWS, id="few-256-256"),
    ],
)
def test_the_size_of_segments_and_blocks_does_not_matter(
    segment: int, block: int, some: tuple[Row, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker.seeded(1, DEVICE)
    inputs = {"logits": normal(len(some), 700)} | parameters(maker, some)
    ids, _ = kernel.sample(**inputs)
    monkeypatch.setattr(kernel, "SEGMENT", segment)
    monkeypatch.setattr(kernel, "BLOCK", block)
    assert torch.equal(kernel.sample(**inputs)[0], ids)


def test_the_public_function_agrees_with_the_kernel() -> None:
    maker = Maker.seeded(2, DEVICE)
    inputs = {"logits": normal(len(ROWS), 97)} | parameters(maker, ROWS) | penalties(maker, len(ROWS), 97)
    assert torch.equal(sample(**inputs)[0], kernel.sample(**inputs)[0])


# Penalties and log-probabilities ----------------------------------------------------------------------------------


def test_penalties_are_applied_token_by_token_as_vllm_does() -> None:
    logits = normal(1, 40)
    counts = torch.tensor([[0, 1, 2, 3] * 10], dtype=torch.int32, device=DEVICE)
    prompt = torch.tensor([[True] * 6 + [False] * 34], device=DEVICE)
    expected = []
    for x, n, in_prompt in zip(logits[0].tolist(), counts[0].tolist(), prompt[0].tolist(), strict=True):
        if n or in_prompt:
            x = x / 1.5 if x > 0 else x * 1.5
        expected.append(x - 0.25 * n - 0.5 * (n > 0))
    factors = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}
    B = 50
    changes = {name: torch.full((B,), x, device=DEVICE) for name, x in factors.items()}
    changes |= {"output_counts": counts.expand(B, -1), "prompt_mask": prompt.expand(B, -1)}
    ids, _ = reference.sample(logits.expand(B, -1), **rows(B, top_p=0.9), **changes)
    penalised = torch.tensor(expected, device=DEVICE).expand(B, -1)
    assert torch.equal(ids, reference.sample(penalised, **rows(B, top_p=0.9))[0])
    some = {name: x[:8] for name, x in (changes | rows(B, top_p=0.9)).items()}
    assert torch.equal(ids[:8], kernel.sample(logits.expand(8, -1), **some)[0])


def test_log_probs_are_those_of_the_model_whatever_changes_the_draw() -> None:
    maker = Maker.seeded(3, DEVICE)
    B = len(ROWS)
    logits = normal(B, 300)
    for implementation in (reference.sample, kernel.sample):
        ids, log_probs = implementation(logits, **parameters(maker, ROWS), **penalties(maker, B, 300))
        expected = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, expected)


# Ties, extremes and broken logits ---------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, [70, 71, 4000]] = 1.0
    logits[2, [2047, 2048]] = 1.0
    for implementation in (reference.sample, kernel.sample):
        assert implementation(logits, **rows(3, temperature=0.0))[0].tolist() == [0, 70, 2047]


def test_the_smallest_temperature_draws_evenly_among_the_largest() -> None:
    logits = torch.zeros(60, 100, device=DEVICE)
    logits[:, [5, 50, 95]] = 0.01
    ids, log_probs = kernel.sample(logits, **rows(60, temperature=1e-6))
    assert set(ids.tolist()) == {5, 50, 95}
    # Twenty each on average, with a standard deviation of 3.7.
    assert torch.bincount(ids).max() < 35
    assert log_probs.isfinite().all()


def test_the_largest_temperature_draws_evenly_among_all() -> None:
    logits = normal(13) * 100
    ids, _ = reference.sample(logits.expand(20_000, -1), **rows(20_000, temperature=1e6))
    # Twelve degrees of freedom.
    assert chi_square(ids, torch.full((13,), 1 / 13, device=DEVICE)) < 40


@pytest.mark.parametrize("row", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}])
def test_masked_and_broken_logits_are_never_drawn(row: dict[str, float]) -> None:
    logits = normal(5, 100)
    logits[:, 2:] = -math.inf
    logits[:, 50] = math.nan
    for implementation in (reference.sample, kernel.sample):
        ids, log_probs = implementation(logits, **rows(5, **row))
        assert (ids < 2).all()
        assert log_probs.isfinite().all()


@pytest.mark.parametrize("row", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_without_any_logit_the_first_token_is_drawn(row: dict[str, float], value: float) -> None:
    logits = torch.full((2, 100), value, device=DEVICE)
    for implementation in (reference.sample, kernel.sample):
        ids, log_probs = implementation(logits, **rows(2, **row))
        assert ids.tolist() == [0, 0]
        assert (log_probs == -math.inf).all()


@pytest.mark.parametrize("row", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 2}, {"top_k": 2, "top_p": 0.9}])
def test_the_largest_and_infinite_logits_are_drawn_and_end_the_search(row: dict[str, float]) -> None:
    logits = normal(4, 100)
    logits[:, 10:] = -FP32_MAX
    logits[0, 7] = FP32_MAX
    logits[1:, 7] = math.inf
    logits[2:, 4] = math.inf
    logits[3, 9] = FP32_MAX
    with np.errstate(all="ignore"):
        ids, _ = kernel.sample(logits, **rows(4, **row))
    assert ids[:2].tolist() == [7, 7]
    assert ids[2] in (4, 7)
    assert ids[3] in (4, 7, 9)


# Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(7)}, r"logits has shape \(7,\), expected \(any, any\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits have shape \(2, 0\), expected at least one token"),
        ({"temperature": torch.zeros(3)}, r"temperature has shape \(3,\), expected \(2\)"),
        ({"top_k": torch.zeros(2)}, "top_k is float32, expected int32"),
        ({"top_p": torch.zeros(2, dtype=torch.float16)}, "top_p is float16, expected float32"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed is int32, expected int64"),
        ({"step": torch.zeros(2, dtype=torch.int64, device="meta")}, "step is on meta, logits on"),
        (
            {"output_counts": torch.zeros(2, 8, dtype=torch.int32)},
            r"output_counts has shape \(2, 8\), expected \(2, 9\)",
        ),
        ({"prompt_mask": torch.zeros(2, 9)}, "prompt_mask is float32, expected bool"),
        ({"presence_penalty": torch.zeros(2)}, "presence_penalty is given without output_counts"),
        ({"frequency_penalty": torch.zeros(2)}, "frequency_penalty is given without output_counts"),
        ({"repetition_penalty": torch.ones(2)}, "repetition_penalty is given without output_counts or prompt_mask"),
    ],
)
def test_arguments_that_do_not_match_are_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 9, device=DEVICE), **rows(2)}
    changed = {n: x if x.is_meta else x.to(DEVICE) for n, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        sample(**{**arguments, **changed})


def test_the_operator_keeps_its_promises_to_torch_compile() -> None:
    maker = Maker.seeded(0, DEVICE)
    limits = tuple(parameters(maker, ROWS[:3]).values())
    torch.library.opcheck(kernel.sample.op, (normal(3, 40), *limits))
    torch.library.opcheck(kernel.sample.op, (normal(3, 40), *limits, *penalties(maker, 3, 40).values()))
