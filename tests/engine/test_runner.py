"""The runner against the model's own forward: batches, padding to fixed sizes, tokens still on the device, drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.config import EngineConfig
from dsv2.engine.batch import accept
from dsv2.engine.paged import page_bytes
from dsv2.engine.runner import Results, Runner
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduler
from dsv2.engine.sequence import Request
from dsv2.model import Transformer
from tests.numerics import SMALL_MODELS, random_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL_MODELS["v2-lite"](), seed=3)


class Harness:
    """A scheduler and a runner that are stepped by hand."""

    def __init__(self, model: Transformer, **limits: Any) -> None:
        limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64} | limits
        config = EngineConfig(**limits)
        self.model = model
        self.scheduler = Scheduler(config, num_pages=24)
        self.runner = Runner(model, 24, config)

    def add(self, prompt: list[int], params: SamplingParams = GREEDY) -> Request:
        request = Request(str(len(self.scheduler.running) + self.scheduler.num_waiting), prompt, params)
        self.scheduler.add(request)
        return request

    def step(self, drafts: dict[int, list[int]] | None = None) -> Results:
        step = self.scheduler.schedule(drafts or {})
        assert step is not None
        results = self.runner.launch(step).results()
        self.scheduler.complete(step, [[each.token_id for each in drawn] for drawn in results.drawn])
        return results

    def finish(self) -> None:
        while self.scheduler.has_unfinished:
            self.step()


def greedy(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def log_probs(model: Transformer, ids: list[int]) -> Tensor:
    """Of the token after each position [T, W]."""
    with torch.no_grad():
        return model(torch.tensor(ids)).float().log_softmax(-1)


PROMPTS = [[5, 9, 2], list(range(3, 90)), [7], list(range(40, 60))]


@pytest.mark.parametrize("sizes", [(), (4,), (3, 16)], ids=["exact", "padded", "too-small-for-some"])
def test_steps_of_any_fixed_size_draw_what_the_model_says(model: Transformer, sizes: tuple[int, ...]) -> None:
    harness = Harness(model, cudagraph_capture_sizes=sizes)
    requests = [harness.add(prompt) for prompt in PROMPTS]
    harness.finish()
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.sequences[0].output_ids == greedy(model, prompt, 6)


def test_tokens_that_the_host_does_not_know_yet_are_read_on_the_device(model: Transformer) -> None:
    harness = Harness(model, cudagraph_capture_sizes=(4,))
    requests = [harness.add(prompt) for prompt in PROMPTS]
    in_flight = []
    num_pending = 0
    while harness.scheduler.has_unfinished:
        step = harness.scheduler.schedule()
        if step is not None:
            num_pending += sum(not entry.known_ids() for entry in step.entries)
            in_flight.append((step, harness.runner.launch(step)))
        if step is None or len(in_flight) == 2:
            oldest, ticket = in_flight.pop(0)
            drawn = ticket.results().drawn
            harness.scheduler.complete(oldest, [[each.token_id for each in tokens] for tokens in drawn])
    assert num_pending > 10
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.sequences[0].output_ids == greedy(model, prompt, 6)


def test_penalties_count_a_token_that_is_still_on_the_device(model: Transformer) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, frequency_penalty=2, presence_penalty=2)

    def outputs(depth: int) -> list[int]:
        harness = Harness(model)
        request = harness.add([5, 9, 2, 5], params)
        in_flight = []
        while harness.scheduler.has_unfinished:
            step = harness.scheduler.schedule() if len(in_flight) < depth else None
            if step is not None:
                in_flight.append((step, harness.runner.launch(step)))
            if step is None or len(in_flight) == depth:
                oldest, ticket = in_flight.pop(0)
                drawn = ticket.results().drawn
                harness.scheduler.complete(oldest, [[each.token_id for each in tokens] for tokens in drawn])
        return request.sequences[0].output_ids

    assert outputs(depth=2) == outputs(depth=1)
    assert len(set(outputs(depth=2))) == 5


def test_log_probabilities_ranks_and_candidates_are_those_of_the_model(model: Transformer) -> None:
    harness = Harness(model, cudagraph_capture_sizes=(2,))
    prompt = [5, 9, 2, 11]
    request = harness.add(prompt, SamplingParams(temperature=5.0, seed=3, max_tokens=8, ignore_eos=True, logprobs=3))
    drawn = [harness.step().drawn[0][0] for _ in range(8)]
    expected = log_probs(model, prompt + request.sequences[0].output_ids)[len(prompt) - 1 :]
    for each, row in zip(drawn, expected, strict=False):
        values, ids = row.sort(descending=True, stable=True)
        assert each.log_prob == pytest.approx(float(row[each.token_id]), abs=1e-5)
        assert each.rank == 1 + ids.tolist().index(each.token_id)
        assert [i for i, _ in each.top] == ids[:3].tolist()
        assert [value for _, value in each.top] == pytest.approx(values[:3].tolist(), abs=1e-5)
    assert max(each.rank for each in drawn) > 3


def test_log_probabilities_of_a_prompt_come_with_its_chunks(model: Transformer) -> None:
    harness = Harness(model)
    prompt = list(range(3, 153))
    harness.add(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    chunks = []
    while harness.scheduler.has_unfinished:
        (chunk,) = harness.step().prompt
        chunks.append(chunk or [])
    assert [len(chunk) for chunk in chunks] == [64, 64, 21]
    expected = log_probs(model, prompt)
    found = [each for chunk in chunks for each in chunk]
    assert [each.token_id for each in found] == prompt[1:]
    for position, each in enumerate(found):
        assert each.log_prob == pytest.approx(float(expected[position, each.token_id]), abs=1e-5)
        assert each.top[0][0] == int(expected[position].argmax())


@pytest.mark.parametrize("sizes", [(), (16,)], ids=["exact", "padded"])
@pytest.mark.parametrize("num_right", [0, 2, 4])
def test_drafts_are_accepted_as_far_as_they_are_what_would_be_drawn(
    model: Transformer, sizes: tuple[int, ...], num_right: int
) -> None:
    prompt = [5, 9, 2]
    expected = greedy(model, prompt, 6)
    harness = Harness(model, num_draft_tokens=4, cudagraph_capture_sizes=sizes)
    request = harness.add(prompt)
    harness.add([8, 8, 1])
    harness.step()
    wrong = [(i + 1) % model.cfg.vocab_size for i in expected]
    draft = [*expected[1 : 1 + num_right], *wrong[1 + num_right : 5]]
    results = harness.step({request.sequences[0].arrival: draft})
    assert [each.token_id for each in results.drawn[0]] == expected[1 : 2 + num_right]
    harness.finish()
    assert request.sequences[0].output_ids == expected


def test_a_sampled_sequence_is_the_same_with_drafts(model: Transformer) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    plain = Harness(model)
    request = plain.add([5, 9, 2], params)
    plain.finish()
    expected = request.sequences[0].output_ids

    harness = Harness(model, num_draft_tokens=3)
    request = harness.add([5, 9, 2], params)
    harness.step()
    harness.step({request.sequences[0].arrival: [*expected[1:3], expected[3] ^ 1]})
    assert request.sequences[0].output_ids == expected[:4]
    harness.finish()
    assert request.sequences[0].output_ids == expected


def test_a_mask_leaves_only_what_it_allows(model: Transformer) -> None:
    harness = Harness(model)
    masked, free = harness.add([5, 9, 2]), harness.add([5, 9, 2])
    bits = torch.zeros(-(-model.cfg.vocab_size // 32), dtype=torch.int32)
    bits[1] = 1 << 3
    step = harness.scheduler.schedule()
    assert step is not None
    results = harness.runner.launch(step, {masked.sequences[0].arrival: bits.numpy()}).results()
    assert results.drawn[0][0].token_id == 35
    assert results.drawn[1][0].token_id == greedy(model, [5, 9, 2], 1)[0]
    expected = log_probs(model, [5, 9, 2])[-1]
    assert results.drawn[0][0].log_prob == pytest.approx(float(expected[35]), abs=1e-5)
    assert free.sequences[0].output_ids == []


@pytest.mark.parametrize(
    ("draft_ids", "drawn_ids", "num"),
    [([], [4], 1), ([4, 5], [4, 5, 6], 3), ([4, 5], [4, 7, 6], 2), ([4, 5], [1, 5, 6], 1)],
)
def test_what_follows_a_wrong_draft_is_dropped(draft_ids: list[int], drawn_ids: list[int], num: int) -> None:
    assert accept(draft_ids, drawn_ids) == num


def test_a_cache_larger_than_the_gpu_is_refused_with_what_would_fit(model: Transformer, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * page_bytes(model) + 1, 0))
    with pytest.raises(ValueError, match=r"num_pages=99 of .* num_pages=10 would fit"):
        Runner(model, 99, EngineConfig(max_model_len=64, max_num_seqs=2))
