"""Random schedules of small models on the CPU: each request is answered as by recomputing everything.

Requests come and go at any time, under limits that make for chunks, preemption, shared prefixes, drafts and padding.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import pytest

from dsv2.config import EngineConfig
from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.core import Engine
from dsv2.engine.llm import LLM
from dsv2.engine.outputs import RequestOutput
from dsv2.engine.sampling import SamplingParams
from dsv2.model import Transformer
from tests.engine.recomputed import KINDS, NUM_TOKENS, Recorder, expected_of, get_model, prompts_of, recompute
from tests.numerics import SMALL_MODELS, random_model

MAX_TOKENS = 14


@cache
def get_small_model() -> Transformer:
    return random_model(SMALL_MODELS["v2-lite"]().replace(num_layers=2, vocab_size=64), seed=3)


@cache
def get_prompts() -> list[list[int]]:
    """Short ones, and some that begin alike, near the bounds of pages."""
    rng = random.Random(0)
    common = rng.choices(range(64), k=PAGE_SIZE)
    return [[7], common[:57], common[2:], common, [*common, 1], [*common, 1, 2, 3, 4], [1, 2, 3] * 20, [9] * 60]


@cache
def get_expected() -> list[tuple[list[int], list[float]]]:
    return [recompute(get_small_model(), prompt, MAX_TOKENS) for prompt in get_prompts()]


class Visit(NamedTuple):
    """A client: asks `delay` steps after the one before, and leaves after `patience` steps."""

    prompt: int
    num_tokens: int
    delay: int
    patience: int


def draw_visits(rng: random.Random) -> list[Visit]:
    return [
        Visit(
            prompt=rng.choice([0, 1, 1, 2, 3, 4, 5, 5, 6, 7]),
            num_tokens=rng.choice([MAX_TOKENS, MAX_TOKENS, MAX_TOKENS, MAX_TOKENS, 4, 1]),
            delay=rng.choice([0, 0, 0, 2, 9]),
            patience=rng.choice([99, 99, 99, 99, 99, 6, 1]),
        )
        for _ in range(rng.randint(4, 7))
    ]


def draw_limits(rng: random.Random) -> dict[str, Any]:
    return {
        "max_num_seqs": rng.choice([2, 3, 3, 5]),
        "max_num_batched_tokens": rng.choice([33, 300, 300]),
        "num_pages": rng.choice([3, 3, 3, 5, 12]),
        "enable_prefix_caching": rng.choice([True, True, False]),
        "num_draft_tokens": rng.choice([0, 0, 3, 7]),
        "cudagraph_capture_sizes": rng.choice([None, (4,), (1, 6, 40)]),
    }


class History:
    """What an engine said to some visitors, and what its steps were like."""

    def __init__(self, limits: dict[str, Any], visits: list[Visit], seen: Counter[str]) -> None:
        self.engine = Engine(get_small_model(), None, EngineConfig(max_model_len=90, **limits))
        self.visits, self.seen = visits, seen
        self.answers: list[list[int]] = [[] for _ in visits]
        self.log_probs, self.has_left = [0.0] * len(visits), [False] * len(visits)
        Recorder(self.engine, seen)

    def run(self) -> None:
        arrivals = deque(enumerate(accumulate(visit.delay for visit in self.visits)))
        leaving = [(time + visit.patience, i) for (i, time), visit in zip(arrivals, self.visits, strict=True)]
        now = 0
        while arrivals or self.engine.has_unfinished:
            while arrivals and arrivals[0][1] <= now:
                self.arrive(arrivals.popleft()[0])
            for i in [i for time, i in leaving if time == now]:
                self.engine.abort(str(i))
                self.has_left[i] = True
            self.step()
            now += 1

    def arrive(self, i: int) -> None:
        visit = self.visits[i]
        params = SamplingParams(temperature=0, max_tokens=visit.num_tokens, ignore_eos=True)
        self.engine.add(get_prompts()[visit.prompt], params, str(i))

    def step(self) -> None:
        for delta in self.engine.step():
            i = int(delta.request_id)
            assert not self.has_left[i]
            self.answers[i] += delta.token_ids
            self.log_probs[i] = delta.cumulative_logprob
            self.seen["drafts accepted"] += len(delta.token_ids) - 1

    def check(self) -> None:
        for i, (visit, answer) in enumerate(zip(self.visits, self.answers, strict=True)):
            ids, log_probs = get_expected()[visit.prompt]
            assert answer == ids[: len(answer)], f"visit {i}"
            assert len(answer) == visit.num_tokens or self.has_left[i]
            assert self.log_probs[i] == pytest.approx(sum(log_probs[: len(answer)]), rel=1e-5, abs=1e-5)
        pool = self.engine.scheduler.pool
        assert pool.num_available == pool.num_pages


@pytest.mark.parametrize("num_histories", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_greedy_output_is_that_of_recomputing_everything_under_any_schedule(num_histories: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(num_histories):
        rng = random.Random(seed)
        history = History(draw_limits(rng), draw_visits(rng), seen)
        try:
            history.run()
            history.check()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        seen["departures"] += sum(history.has_left)
    assert len(seen) == 10 and min(seen.values()) >= num_histories // 4, f"the schedules were too easy: {seen}"


# Long outputs, in every architecture ------------------------------------------------------------------------------


def check_history(kind: str, seed: int, seen: Counter[str]) -> None:
    """A few calls to one engine of random limits."""
    rng = random.Random(seed)
    num_seqs = rng.randint(2, 5)
    llm = LLM(
        get_model(kind),
        max_model_len=200,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=rng.choice([9, 33, 70, 300]),
        num_pages=rng.choice([4, 5, 5, 6, 20]),
        enable_prefix_caching=rng.random() < 0.8,
        num_draft_tokens=3 if seed % 2 else 0,
    )
    Recorder(llm.engine, seen)
    for _ in range(rng.randint(1, 2)):
        # Long outputs follow prompts of about a page, and grow into two more.
        longest, choice = rng.choice([(9, range(6)), (NUM_TOKENS, range(2, 5))])
        chosen = rng.choices(choice, k=rng.randint(3, 6))
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=rng.choice([rng.randint(1, longest), longest, longest]),
                ignore_eos=True,
                stop_token_ids=rng.choice([[], [], [rng.choice(expected_of(kind)[i][0])]]),
            )
            for i in chosen
        ]
        outputs = llm.generate([prompts_of(kind)[i] for i in chosen], params)
        for i, each, output in zip(chosen, params, outputs, strict=True):
            check_output(output, prompts_of(kind)[i], expected_of(kind)[i], each, f"seed {seed}, prompt {i}")
        assert llm.engine.scheduler.pool.num_available == llm.engine.scheduler.pool.num_pages


def check_output(
    output: RequestOutput,
    prompt: list[int],
    expected: tuple[list[int], list[float]],
    params: SamplingParams,
    where: str,
) -> None:
    ids, log_probs = expected
    stops = [n for n, i in enumerate(ids, 1) if i in params.stop_token_ids]
    num_tokens = min([*stops, params.max_tokens or NUM_TOKENS])
    completion = output.outputs[0]
    assert output.prompt_token_ids == prompt, where
    assert completion.token_ids == ids[:num_tokens], where
    assert completion.cumulative_logprob == pytest.approx(sum(log_probs[:num_tokens]), rel=1e-5), where
    assert completion.finish_reason == ("stop" if num_tokens in stops else "length"), where


@pytest.mark.parametrize("kind", KINDS)
def test_long_greedy_outputs_are_those_of_recomputing_everything_under_any_limits(kind):
    seen: Counter[str] = Counter()
    for seed in range(5):
        check_history(kind, seed, seen)
    for what in (
        "decodes of several sequences",
        "prefill beside decode",
        "chunks",
        "steps of resumed sequences",
        "prefix hits",
        "tokens on the device",
        "drafts",
    ):
        assert seen[what] >= 5, f"{what}: {seen}"
