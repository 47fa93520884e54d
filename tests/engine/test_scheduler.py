"""The scheduler under thousands of random histories: whatever it does, every sequence is what it would be alone.

And its decisions one at a time.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv2.config.engine import PAGE_SIZE, EngineConfig
from dsv2.engine import scheduler as scheduler_module
from dsv2.engine import sequence as sequence_module
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduler, Step
from dsv2.engine.sequence import Request, Sequence, Status
from tests.engine.histories import EOS, VOCAB, History

NAMES = map(str, itertools.count())


@pytest.fixture(params=[4, PAGE_SIZE], ids=["pages of 4", "pages of 64"])
def page_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Short pages fill, run out and are shared far more often in as many steps."""
    for module in (scheduler_module, sequence_module):
        monkeypatch.setattr(module, "PAGE_SIZE", request.param)
    return request.param


@pytest.mark.parametrize("group", range(4))
def test_any_schedule_generates_what_each_sequence_would_alone(page_size: int, group: int) -> None:
    num_preemptions = num_cached_tokens = 0
    num_histories = 400 if page_size < PAGE_SIZE else 20
    for seed in range(group * num_histories, (group + 1) * num_histories):
        history = History(seed, page_size)
        try:
            history.run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        num_preemptions += history.num_preemptions
        num_cached_tokens += history.num_cached_tokens
    assert num_preemptions and num_cached_tokens, "the schedules were too easy"


# One decision at a time -------------------------------------------------------------------------------------------


def engine(num_pages: int = 100, **limits: Any) -> Scheduler:
    plain: dict[str, Any] = {"max_model_len": 2000, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    return Scheduler(EngineConfig(**(plain | limits)), num_pages=num_pages, eos_token_ids=[EOS])


def ask(scheduler: Scheduler, prompt_ids: list[int], salt: str = "", **params: Any) -> list[Sequence]:
    """A new request's sequences."""
    request = Request(next(NAMES), prompt_ids, SamplingParams(**params), cache_salt=salt)
    scheduler.add(request)
    return request.sequences


def prompt(num_tokens: int, seed: float = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB), k=num_tokens)


def start(scheduler: Scheduler, drafts: dict[Sequence, list[int]] | None = None) -> Step:
    step = scheduler.schedule({s.arrival: ids for s, ids in (drafts or {}).items()})
    assert step is not None
    return step


def finish_step(scheduler: Scheduler, step: Step, token_id: int = 7) -> list[int]:
    return scheduler.complete(step, [[token_id] if entry.samples else [] for entry in step.entries])


def sizes(step: Step) -> dict[Sequence, int]:
    return {entry.sequence: entry.num_tokens for entry in step.entries}


def advance(scheduler: Scheduler, num_steps: int = 1) -> list[dict[Sequence, int]]:
    """How many tokens each of the next steps computed of which sequence."""
    done = []
    for _ in range(num_steps):
        step = start(scheduler)
        finish_step(scheduler, step)
        done.append(sizes(step))
    return done


def run_all(scheduler: Scheduler) -> list[dict[Sequence, int]]:
    done = []
    while scheduler.has_unfinished:
        done += advance(scheduler)
    return done


def test_a_prompt_is_computed_in_chunks_beside_decoding_sequences() -> None:
    scheduler = engine(max_num_batched_tokens=100)
    (short,) = ask(scheduler, prompt(20))
    advance(scheduler)
    (long,) = ask(scheduler, prompt(250, seed=1))
    assert advance(scheduler, 4) == [{short: 1, long: n} for n in (99, 99, 52, 1)]


def test_no_more_sequences_run_than_may() -> None:
    scheduler = engine(max_num_seqs=2)
    for seed in range(5):
        ask(scheduler, prompt(5, seed), max_tokens=3)
    assert [len(done) for done in run_all(scheduler)] == [2] * 6 + [1] * 3


def test_equals_start_and_finish_in_order_of_arrival() -> None:
    scheduler = engine(num_pages=9, max_num_seqs=4)
    sequences = [ask(scheduler, prompt(60, seed), max_tokens=100)[0] for seed in range(12)]
    started, finished = [], []
    while scheduler.has_unfinished:
        started += [s for s in advance(scheduler)[0] if s not in started]
        finished += [s for s in sequences if s.is_finished and s not in finished]
    assert started == finished == sequences
    assert sum(s.num_preemptions for s in sequences) > 0


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    scheduler = engine(num_pages=10)
    early = [ask(scheduler, prompt(10, seed), max_tokens=8 + seed)[0] for seed in range(4)]
    (large,) = ask(scheduler, prompt(600), max_tokens=1)
    while not large.is_finished:
        ask(scheduler, prompt(10), max_tokens=8)
        assert advance(scheduler)[0].keys() <= {*early, large}


def test_the_latest_arrival_is_preempted_and_finds_the_beginning_of_its_pages_again() -> None:
    scheduler = engine(num_pages=7)
    (first,), (second,) = ask(scheduler, prompt(120), max_tokens=200), ask(scheduler, prompt(180, 1), max_tokens=200)
    while second.status is not Status.PREEMPTED:
        advance(scheduler)
    num_known = second.num_tokens
    assert len(first.pages) == 4 and not second.pages and num_known > 192
    while not first.is_finished:
        assert second not in advance(scheduler)[0]
    # Three pages of the second were full, and the first needed one of them: the last.
    assert advance(scheduler) == [{second: num_known - 2 * PAGE_SIZE}]
    run_all(scheduler)
    assert (second.num_output_tokens, second.num_preemptions, first.num_preemptions) == (200, 1, 0)


@pytest.mark.parametrize(("num_pages", "is_admitted"), [(4, False), (5, True)])
def test_admission_leaves_a_page_for_every_running_sequence(num_pages: int, is_admitted: bool) -> None:
    scheduler = engine(num_pages)
    ask(scheduler, prompt(100))
    (second,) = ask(scheduler, prompt(70, 1))
    assert (second in advance(scheduler)[0]) == is_admitted


# Prefixes ---------------------------------------------------------------------------------------------------------


def test_n_sequences_compute_their_prompt_once() -> None:
    scheduler = engine()
    sequences = ask(scheduler, prompt(200), n=8, max_tokens=1)
    assert run_all(scheduler) == [{sequences[0]: 200}, dict.fromkeys(sequences[1:], 200 - 3 * PAGE_SIZE)]
    assert [s.num_cached_tokens for s in sequences] == [0] + [3 * PAGE_SIZE] * 7


def test_who_shares_a_beginning_that_is_being_computed_waits_for_it_and_others_pass() -> None:
    scheduler = engine()
    (first,), (same,), (other,) = (
        ask(scheduler, ids) for ids in (prompt(200), prompt(200)[:128] + prompt(50, 1), prompt(30, 2))
    )
    assert advance(scheduler, 2) == [{first: 200, other: 30}, {first: 1, other: 1, same: 50}]


@pytest.mark.parametrize(("num_tokens", "num_left"), [(1, 1), (63, 63), (64, 64), (65, 1), (128, 64), (129, 1)])
def test_of_a_cached_prompt_the_last_token_is_computed(num_tokens: int, num_left: int) -> None:
    scheduler = engine()
    ask(scheduler, prompt(num_tokens), max_tokens=1)
    run_all(scheduler)
    (again,) = ask(scheduler, prompt(num_tokens), max_tokens=1)
    assert run_all(scheduler) == [{again: num_left}]


def test_generated_tokens_are_cached_too() -> None:
    scheduler = engine()
    (first,) = ask(scheduler, prompt(100), max_tokens=100)
    run_all(scheduler)
    (turn,) = ask(scheduler, [*first.token_ids, 5], max_tokens=1)
    assert run_all(scheduler) == [{turn: 201 - 3 * PAGE_SIZE}]


@pytest.mark.parametrize(
    ("limits", "asked"),
    [({}, {"salt": "adapter"}), ({}, {"prompt_logprobs": 0}), ({"enable_prefix_caching": False}, {})],
    ids=["another salt", "log-probabilities of the prompt", "caching disabled"],
)
def test_nothing_is_shared_with(limits: dict[str, Any], asked: dict[str, Any]) -> None:
    scheduler = engine(**limits)
    ask(scheduler, prompt(200), max_tokens=1)
    run_all(scheduler)
    (other,) = ask(scheduler, prompt(200), max_tokens=1, **asked)
    assert run_all(scheduler) == [{other: 200}]


def test_log_probabilities_of_a_prompt_are_computed_by_the_first_of_its_sequences() -> None:
    scheduler = engine()
    first, second = ask(scheduler, prompt(200), n=2, max_tokens=1, prompt_logprobs=1)
    assert run_all(scheduler) == [{first: 200}, {second: 8}]


def test_new_weights_forget_every_prefix_once_nothing_runs() -> None:
    scheduler = engine()
    ask(scheduler, prompt(200), max_tokens=2)
    advance(scheduler)
    with pytest.raises(ValueError, match="4 pages are in use"):
        scheduler.forget_prefixes()
    run_all(scheduler)
    scheduler.forget_prefixes()
    (again,) = ask(scheduler, prompt(200), max_tokens=1)
    assert run_all(scheduler) == [{again: 200}]


# Ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "tokens", "num_kept", "reason"),
    [
        ({}, [5, EOS, 6], 2, "stop"),
        ({"ignore_eos": True, "max_tokens": 3}, [5, EOS, 6], 3, "length"),
        ({"stop_token_ids": [9], "ignore_eos": True}, [EOS, 9, 6], 2, "stop"),
        ({"min_tokens": 3}, [EOS, EOS, EOS], 3, "stop"),
        ({"max_tokens": 2}, [5, EOS, 6], 2, "stop"),
        ({"max_tokens": None}, [5] * 20, 10, "length"),
        ({"max_tokens": 11}, [5] * 20, 10, "length"),
    ],
)
def test_a_sequence_ends(params: dict[str, Any], tokens: list[int], num_kept: int, reason: str) -> None:
    scheduler = engine(max_model_len=30)
    (sequence,) = ask(scheduler, prompt(20), **params)
    for token_id in tokens[:num_kept]:
        assert not sequence.is_finished
        finish_step(scheduler, start(scheduler), token_id)
    assert (sequence.output_ids, sequence.finish_reason) == (tokens[:num_kept], reason)
    assert not scheduler.has_unfinished and scheduler.schedule() is None


def test_a_request_can_be_aborted_whatever_it_is_doing() -> None:
    scheduler = engine(num_pages=5, max_num_seqs=2)
    sequences = [ask(scheduler, prompt(60, seed), max_tokens=200)[0] for seed in range(3)]
    while sequences[1].status is not Status.PREEMPTED:
        advance(scheduler)
    step = start(scheduler)
    assert sequences[2].status is Status.WAITING and sizes(step) == {sequences[0]: 1}
    for sequence in reversed(sequences):
        for _ in range(2):
            scheduler.abort(sequence.request_id)
    assert [s.finish_reason for s in sequences] == ["abort"] * 3
    assert finish_step(scheduler, step) == [0]
    assert scheduler.pool.num_available == 5 and not scheduler.has_unfinished


def test_ten_thousand_requests_with_cancellations_leave_every_page_free() -> None:
    rng, scheduler = random.Random(0), engine(num_pages=60, max_num_seqs=24)
    beginnings = [prompt(64 * n, seed=n) for n in range(4)]
    sequences: list[Sequence] = []
    for _ in range(10_000):
        sequences += ask(scheduler, rng.choice(beginnings) + prompt(3, rng.random()), max_tokens=rng.randint(1, 6))
        if rng.random() < 0.1:
            scheduler.abort(rng.choice(sequences[-40:]).request_id)
        if step := scheduler.schedule():
            finish_step(scheduler, step)
    run_all(scheduler)
    assert scheduler.pool.num_available == 60 and all(s.is_finished and not s.pages for s in sequences)
    assert {s.finish_reason for s in sequences} == {"abort", "length"}


@pytest.mark.parametrize(
    ("num_tokens", "params", "message"),
    [
        (2000, {}, "a prompt of 2000 tokens leaves no room for output, expected at most 1999"),
        (600, {"max_tokens": 42}, r"a prompt of 600 tokens with max_tokens=42 may need 11 pages.* max_tokens=41 would"),
        (
            1,
            {"max_tokens": None},
            "with max_tokens=None may need 32 pages of 64 tokens, the cache has 10: max_tokens=640",
        ),
        (641, {"max_tokens": 1}, "may need 11 pages of 64 tokens, the cache has 10: a prompt of 640 tokens would fit"),
    ],
)
def test_what_could_never_run_is_refused_with_what_would_fit(num_tokens: int, params: Any, message: str) -> None:
    scheduler = engine(num_pages=10)
    with pytest.raises(ValueError, match=message):
        ask(scheduler, prompt(num_tokens), **params)
    assert not scheduler.has_unfinished
    ask(scheduler, prompt(600), max_tokens=41)
    run_all(scheduler)


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [([], "prompt is empty"), ([3, -1], "token id -1 must not"), ([1.5], "token ids"), ("ab", "ids"), ([2**63], "ids")],
)
def test_what_is_no_prompt_is_refused(prompt_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"request 'a': .*{message}"):
        Request("a", prompt_ids, SamplingParams())


def test_a_request_is_added_once() -> None:
    scheduler, request = engine(), Request("a", [1], SamplingParams(max_tokens=1))
    scheduler.add(request)
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        scheduler.add(Request("a", [2], SamplingParams()))
    run_all(scheduler)
    with pytest.raises(ValueError, match="request 'a' was added before"):
        scheduler.add(request)


# Drafts -----------------------------------------------------------------------------------------------------------


def test_accepted_drafts_are_kept_up_to_the_end_and_pages_of_others_given_back() -> None:
    scheduler = engine()
    (sequence,) = ask(scheduler, prompt(62), max_tokens=100)
    advance(scheduler)
    step = start(scheduler, {sequence: [11, 12, 13, 14]})
    assert step.entries[0].known_ids() == [7, 11, 12, 13, 14] and len(sequence.pages) == 2
    assert scheduler.complete(step, [[11]]) == [1]
    assert len(sequence.pages) == 1 and sequence.num_computed_tokens == 63
    step = start(scheduler, {sequence: [12, 13, EOS, 14]})
    assert scheduler.complete(step, [[12, 13, EOS, 14, 15]]) == [3]
    assert sequence.output_ids == [7, 11, 12, 13, EOS] and sequence.finish_reason == "stop"


def test_drafts_take_what_is_spare_of_budget_length_and_pages() -> None:
    scheduler = engine(num_pages=3, max_num_batched_tokens=10, max_num_seqs=2)
    (first,), (second,) = ask(scheduler, prompt(3), max_tokens=6), ask(scheduler, prompt(4, 1), max_tokens=124)
    advance(scheduler)
    draft = list(range(20, 40))
    step = start(scheduler, {first: draft, second: draft})
    assert sizes(step) == {first: 5, second: 5}, "of 10 tokens, 2 were no drafts, and 5 can follow the first's own"
    scheduler.complete(step, [[7], [7]])
    while second.num_computed_tokens < 60:
        advance(scheduler)
    assert first.is_finished and sizes(start(scheduler, {second: draft})) == {second: 10}


@pytest.mark.parametrize(("num_pages", "num_computed"), [(6, 64), (7, 101)])
def test_a_draft_leaves_a_page_for_every_running_sequence(num_pages: int, num_computed: int) -> None:
    scheduler = engine(num_pages)
    (first,), (second,) = (ask(scheduler, prompt(64, seed), max_tokens=120) for seed in range(2))
    advance(scheduler)
    step = start(scheduler, {first: [3] * 100})
    assert sizes(step) == {first: num_computed, second: 1}
    assert scheduler.pool.num_available == 2


# Steps in flight --------------------------------------------------------------------------------------------------


def test_the_next_step_is_scheduled_before_the_last_ones_tokens_are_known() -> None:
    scheduler = engine()
    (sequence,) = ask(scheduler, prompt(20), max_tokens=6)
    steps = [start(scheduler), start(scheduler)]
    for token_id in range(10, 14):
        assert steps[-1].entries[0].known_ids() == [] and sizes(steps[-1]) == {sequence: 1}
        finish_step(scheduler, steps.pop(0), token_id)
        steps.append(start(scheduler))
    assert scheduler.schedule() is None, "the last token is sampled by a step in flight"
    for step in steps:
        finish_step(scheduler, step, 20)
    assert sequence.output_ids == [10, 11, 12, 13, 20, 20]


def test_what_was_scheduled_beyond_an_end_is_dropped() -> None:
    scheduler = engine()
    (sequence,) = ask(scheduler, prompt(20))
    steps = [start(scheduler), start(scheduler)]
    assert [finish_step(scheduler, step, EOS) for step in steps] == [[1], [0]]
    assert sequence.output_ids == [EOS] and scheduler.pool.num_available == 100


def test_no_draft_follows_a_token_that_is_not_known() -> None:
    scheduler = engine()
    (sequence,) = ask(scheduler, prompt(20))
    start(scheduler)
    assert sizes(start(scheduler, {sequence: [1, 2]})) == {sequence: 1}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "0 lists of tokens for a step of 2 entries"),
        ([[7], []], "entry 1 has 0 tokens, expected 1 to 1"),
        ([[7, 8], [7]], "entry 0 has 2 tokens, expected 1 to 1"),
    ],
)
def test_results_that_do_not_belong_to_a_step_change_nothing(results: list[list[int]], message: str) -> None:
    scheduler = engine()
    for seed in range(2):
        ask(scheduler, prompt(20, seed))
    step, following = start(scheduler), start(scheduler)
    with pytest.raises(ValueError, match=message):
        scheduler.complete(step, results)
    with pytest.raises(ValueError, match="step 1 is not the oldest in flight, which is 0"):
        finish_step(scheduler, following)
    assert finish_step(scheduler, step) == finish_step(scheduler, following) == [1, 1]
    with pytest.raises(ValueError, match="step 1 is not the oldest in flight, which is None"):
        finish_step(scheduler, following)


def test_policy_needs_no_torch() -> None:
    code = "import sys, dsv2.engine.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
