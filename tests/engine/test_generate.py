"""Generation over a cache is the same function as recomputing everything, whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch

from dsv2.engine.generate import Sampling, draw, generate
from dsv2.kernels.sample.reference import kept
from dsv2.model import Transformer
from tests.numerics import SMALL_MODELS, random_model

KINDS = ["v2", "v2-lite", "llama", "mixtral"]
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(SMALL_MODELS[request.param](), seed=3, std=0.1)


@pytest.fixture(scope="module")
def lite() -> Transformer:
    return random_model(SMALL_MODELS["v2-lite"](), seed=3, std=0.1)


def recompute(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy, the whole sequence through the model for every token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def test_cached_greedy_equals_recomputing_token_for_token(model):
    expected = [recompute(model, p, 12) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids=[]) == expected


def test_a_batch_equals_its_sequences_alone(model):
    batch = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[])
    assert batch == [generate(model, [p], max_new_tokens=8, stop_ids=[])[0] for p in PROMPTS]


def test_a_sampled_sequence_does_not_depend_on_its_neighbours(lite):
    sampling = Sampling(temperature=1.0, seed=4)
    batch = generate(lite, PROMPTS, max_new_tokens=8, sampling=sampling, stop_ids=[])
    others = [PROMPTS[0], [8, 8, 8, 8], [1]]
    assert generate(lite, others, max_new_tokens=8, sampling=sampling, stop_ids=[])[0] == batch[0]


def test_seeds_repeat_and_differ(lite):
    def run(seed: int) -> list[list[int]]:
        return generate(lite, PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=seed), stop_ids=[])

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_stop_id_ends_its_sequence_only(lite):
    free = generate(lite, PROMPTS, max_new_tokens=10, stop_ids=[])
    stop = free[0][3]
    stopped = generate(lite, PROMPTS, max_new_tokens=10, stop_ids=[stop])
    for ids, expected in zip(stopped, free, strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert ids == expected[:end]


def test_every_token_is_announced_once_in_order(lite):
    heard: list[list[int]] = [[], [], []]
    out = generate(lite, PROMPTS, max_new_tokens=6, stop_ids=[], on_token=lambda i, t: heard[i].append(t))
    assert heard == out


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-6)])
def test_one_candidate_left_is_greedy(lite, sampling):
    greedy = generate(lite, PROMPTS, max_new_tokens=6, stop_ids=[])
    assert generate(lite, PROMPTS, max_new_tokens=6, sampling=sampling, stop_ids=[]) == greedy


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=0.5), [0.25, 0.0625, 0.0225, 0.01]),
    ],
    ids=["plain", "top-k", "top-p", "cold"],
)
def test_samples_follow_the_distribution(sampling, expected):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    num = 8000
    counts = torch.bincount(draw(logits.expand(num, 4), sampling, range(num), step=0), minlength=4)
    for count, p in zip(counts.tolist(), (e / sum(expected) for e in expected), strict=True):
        assert abs(count / num - p) <= 4 * math.sqrt(p * (1 - p) / num)


def test_no_prompts_make_no_outputs(lite):
    assert generate(lite, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1, -1]], 4, "token id -1 is outside the vocabulary"),
        ([[512]], 4, "token id 512 is outside the vocabulary of 512"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_bad_requests_are_refused(lite, prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(lite, prompts, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_bad_sampling_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


# Order, seeds and limits ------------------------------------------------------------------------------------------


def test_tokens_are_announced_round_by_round(lite):
    free = generate(lite, PROMPTS, max_new_tokens=5, stop_ids=[])
    stop = free[1][1]
    heard: list[tuple[int, int]] = []
    out = generate(lite, PROMPTS, max_new_tokens=5, stop_ids=[stop], on_token=lambda i, t: heard.append((i, t)))
    rounds = [[(i, ids[n]) for i, ids in enumerate(out) if n < len(ids)] for n in range(5)]
    assert heard == [event for events in rounds for event in events]
    assert len(out[1]) < 5


@pytest.mark.parametrize("name", ["v2", "llama"])
def test_a_sampled_batch_equals_singles_with_their_own_seeds(name):
    model = random_model(SMALL_MODELS[name](), seed=3, std=0.1)
    batch = generate(model, PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=0.8, seed=5), stop_ids=[])
    for i, prompt in enumerate(PROMPTS):
        alone = Sampling(temperature=0.8, seed=5 + i)
        assert generate(model, [prompt], max_new_tokens=8, sampling=alone, stop_ids=[]) == [batch[i]]


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_models_own_eos_ends_a_sequence_unless_told_otherwise(as_tuple):
    free = generate(random_model(SMALL_MODELS["v2"]()), PROMPTS[:1], max_new_tokens=6, stop_ids=[])[0]
    eos = free[2]
    model = random_model(SMALL_MODELS["v2"]().replace(eos_token_id=(511, eos) if as_tuple else eos))
    assert generate(model, PROMPTS[:1], max_new_tokens=6) == [free[: free.index(eos) + 1]]
    assert generate(model, PROMPTS[:1], max_new_tokens=6, stop_ids=[]) == [free]


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-300])
def test_the_coldest_temperatures_are_greedy_and_stay_numbers(temperature):
    logits = torch.tensor([1.0, 3.0, 2.9, -50.0])
    assert draw(logits.expand(20, 4), Sampling(temperature=temperature), range(20), step=0).tolist() == [1] * 20


def test_without_top_p_the_longest_tail_can_still_be_drawn():
    # In fp32 the running sum reaches its end long before the last of these.
    logits = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)) * 8
    temperature, top_k, top_p, min_p = (torch.tensor([[x]]) for x in (1.0, 0, 1.0, 0.0))
    assert kept(logits, temperature, top_k, top_p, min_p).all()


def test_top_k_beyond_the_vocabulary_restricts_nothing():
    drawn = draw(torch.zeros(100, 4), Sampling(temperature=1.0, top_k=2**40), range(100), step=0)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be in"):
        Sampling(temperature=1.0, seed=seed)
