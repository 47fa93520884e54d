"""The engine's loop over a runner that draws from a script: what is said of every sequence, when, and what is left.

The real runner and its numbers are in test_llm.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from dsv2.config import EngineConfig
from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.core import Engine
from dsv2.engine.outputs import Delta, Logprob
from dsv2.engine.runner import Drawn, Results
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Scheduled, Step
from dsv2.engine.sequence import Sequence
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from tests.numerics import SMALL_MODELS, random_model

Script = Callable[[Sequence, int], int]
"""The sequence's output of this number."""


@cache
def get_tokenizer() -> Tokenizer:
    return Tokenizer.train(["The quick brown fox jumps over the lazy dog. " * 3], 300)


@cache
def get_model() -> Transformer:
    tokenizer = get_tokenizer()
    return random_model(SMALL_MODELS["llama"]().replace(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id))


class ScriptedRunner:
    """Draws what a script says, computes nothing, and notes what it is asked, in order. May fail when told to."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.events: list[str] = []
        self.drafts: list[tuple[int, ...]] = []
        self.fails_at: str | None = None

    def launch(self, step: Step, masks: object = None) -> ScriptedTicket:
        self.note(f"launch {step.number}")
        self.drafts += [entry.draft_ids for entry in step.entries if entry.draft_ids]
        results = Results([self.draw(e) for e in step.entries], [self.describe_prompt(e) for e in step.entries])
        return ScriptedTicket(self, step.number, results)

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.fails_at:
            raise RuntimeError(event)

    def draw(self, entry: Scheduled) -> list[Drawn]:
        sequence, drawn = entry.sequence, []
        first = entry.start + entry.num_tokens - len(entry.draft_ids) - sequence.num_prompt_tokens
        if not entry.samples:
            return []
        for number, draft in enumerate((*entry.draft_ids, -1), first):
            token_id = self.script(sequence, number)
            candidates = tuple((i, -float(i)) for i in range(1, 1 + (sequence.params.logprobs or 0)))
            drawn.append(Drawn(token_id, -0.5, 2, candidates))
            if token_id != draft:
                break
        return drawn

    def describe_prompt(self, entry: Scheduled) -> list[Drawn] | None:
        sequence = entry.sequence
        if sequence.index or sequence.params.prompt_logprobs is None:
            return None
        stop = min(entry.start + entry.num_tokens + 1, sequence.num_prompt_tokens)
        return [Drawn(sequence.token_ids[p], -float(p), 1, ()) for p in range(entry.start + 1, stop)]


class ScriptedTicket:
    def __init__(self, runner: ScriptedRunner, number: int, results: Results) -> None:
        self.runner, self.number, self._results = runner, number, results

    def results(self) -> Results:
        self.runner.note(f"results {self.number}")
        return self._results


def scripted(script: Script, **limits: Any) -> tuple[Engine, ScriptedRunner]:
    config: dict[str, Any] = {"max_model_len": 400, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 20}
    engine, runner = Engine(get_model(), get_tokenizer(), EngineConfig(**(config | limits))), ScriptedRunner(script)
    cast(Any, engine).runner = runner
    return engine, runner


def writing(text: str, **limits: Any) -> tuple[Engine, ScriptedRunner]:
    """An engine that answers every prompt with the bytes of `text`, then eos."""
    tokenizer = get_tokenizer()
    ids = [*(i for char in text for i in tokenizer.encode(char)), tokenizer.eos_id]
    return scripted(lambda sequence, number: ids[min(number, len(ids) - 1)], **limits)


def counting(sequence: Sequence, number: int) -> int:
    return 10 + number % 200


def run(engine: Engine, num_steps: int = 10_000) -> list[Delta]:
    deltas: list[Delta] = []
    while engine.has_unfinished and num_steps:
        deltas += engine.step()
        num_steps -= 1
    return deltas


def ask(engine: Engine, prompt: str | list[int] = "a", **params: Any) -> list[Delta]:
    engine.add(prompt, SamplingParams(**{"max_tokens": 60, **params}))
    return run(engine)


def is_empty(engine: Engine) -> bool:
    """Whether nothing of any request is left, in engine or scheduler, and all pages are free."""
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    state = [*vars(engine).values(), *vars(scheduler).values()]
    left = [each for each in state if isinstance(each, (dict, list, deque, set)) and each]
    return not left and pool.num_available == pool.num_pages


# Steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_launched_before_the_results_of_the_one_before_are_taken() -> None:
    engine, runner = scripted(counting)
    assert [delta.token_ids for delta in ask(engine, max_tokens=4)] == [[10], [11], [12], [13]]
    assert runner.events == [
        *("launch 0", "launch 1", "results 0", "launch 2", "results 1", "launch 3", "results 2", "results 3"),
    ]


def test_every_step_makes_one_delta_of_each_sequence_that_got_tokens() -> None:
    engine, _ = scripted(counting, max_num_batched_tokens=16, max_num_seqs=2)
    engine.add([5], SamplingParams(max_tokens=3), "short")
    engine.add([6] * 30, SamplingParams(max_tokens=1), "long")
    said = [[(d.request_id, d.token_ids, d.finish_reason) for d in engine.step()] for _ in range(4)]
    first, second, third = (("short", [i], "length" if i == 12 else None) for i in (10, 11, 12))
    assert said == [[first], [second, ("long", [10], "length")], [third], []] and is_empty(engine)


def test_what_a_step_beyond_the_end_drew_is_not_said() -> None:
    engine, runner = writing("ab")
    assert "".join(delta.text for delta in ask(engine)) == "ab"
    assert runner.events[-2:] == ["results 2", "results 3"] and is_empty(engine)


def test_sequences_of_a_request_are_told_apart_by_index() -> None:
    engine, _ = scripted(lambda sequence, number: 10 * sequence.index + number)
    deltas = ask(engine, n=3, max_tokens=2)
    answers = {i: [id for d in deltas if d.index == i for id in d.token_ids] for i in range(3)}
    assert answers == {0: [0, 1], 1: [10, 11], 2: [20, 21]} and is_empty(engine)


# Speculation ------------------------------------------------------------------------------------------------------


def repeating(sequence: Sequence, number: int) -> int:
    return 10 + number % 6


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
def test_accepted_drafts_come_in_one_delta_and_change_nothing(num_draft_tokens: int) -> None:
    plain, guessed = scripted(repeating), scripted(repeating, num_draft_tokens=num_draft_tokens)
    expected, deltas = ask(plain[0], max_tokens=50, logprobs=1), ask(guessed[0], max_tokens=50, logprobs=1)
    for field in ("token_ids", "logprobs"):
        assert sum((getattr(d, field) for d in deltas), []) == sum((getattr(d, field) for d in expected), [])
    assert "".join(d.text for d in deltas) == "".join(d.text for d in expected)
    # Two tokens of the second round are drawn before a run of two stands there twice.
    assert len(deltas) == 8 + -(-42 // (1 + num_draft_tokens)) and deltas[-1].finish_reason == "length"
    assert is_empty(guessed[0])


def test_with_speculation_results_are_taken_before_the_next_step_is_scheduled() -> None:
    engine, runner = scripted(counting, num_draft_tokens=3)
    ask(engine, max_tokens=3)
    assert runner.events == ["launch 0", "results 0", "launch 1", "results 1", "launch 2", "results 2"]


def test_what_is_drafted_continues_the_sequence() -> None:
    engine, runner = scripted(repeating, num_draft_tokens=3)
    ask(engine, [10, 11, 50, 51, 9], max_tokens=6)
    assert runner.drafts == [(50, 51, 9)]


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 1}, {"frequency_penalty": 1}, {"repetition_penalty": 2}, {"min_tokens": 40}],
    ids=lambda params: next(iter(params)),
)
def test_nothing_is_drafted_where_more_than_the_models_scores_decide(params: dict[str, Any]) -> None:
    engine, runner = scripted(repeating, num_draft_tokens=3)
    ask(engine, max_tokens=40, **params)
    assert not runner.drafts


def test_drafting_begins_once_min_tokens_are_there() -> None:
    engine, runner = scripted(repeating, num_draft_tokens=3)
    assert len(ask(engine, max_tokens=28, min_tokens=20)) == 20 + 2
    assert len(runner.drafts) == 2


def test_tokens_after_a_stop_string_are_dropped_also_where_they_came_with_it() -> None:
    text = "abcdefgh" * 4
    engine, runner = writing(text, num_draft_tokens=7)
    deltas = ask(engine, stop="ef", min_tokens=8)
    assert "".join(d.text for d in deltas) == text[:12] and max(map(len, runner.drafts)) == 7
    assert get_tokenizer().decode(sum((d.token_ids for d in deltas), [])) == text[:14]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "ef") and is_empty(engine)


# Text and ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "texts", "finish_reason", "stop_reason"),
    [
        ({}, ["o", "n", "e", ",", " ", "t", "w", "o", ""], "stop", None),
        ({"max_tokens": 3}, ["o", "n", "e"], "length", None),
        ({"stop": ["e, x", "two"]}, ["o", "n", "", "", "", "e, ", "", ""], "stop", "two"),
        ({"stop": ["e, x"]}, ["o", "n", "", "", "", "e, t", "w", "o", ""], "stop", None),
        ({"stop": ["one!"], "max_tokens": 3}, ["", "", "one"], "length", None),
        ({"stop": ["e"], "include_stop_str_in_output": True}, ["o", "n", "e"], "stop", "e"),
        ({"stop_token_ids": [ord(",") - 33]}, ["o", "n", "e", ""], "stop", ord(",") - 33),
    ],
    ids=["eos", "length", "stop string", "no stop string", "held to the end", "included", "stop token"],
)
def test_text_is_shown_once_no_stop_string_can_begin_in_it(
    params: dict[str, Any], texts: list[str], finish_reason: str, stop_reason: str | int | None
) -> None:
    engine, _ = writing("one, two")
    deltas = ask(engine, **params)
    assert [delta.text for delta in deltas] == texts
    assert {delta.finish_reason for delta in deltas[:-1]} <= {None}
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (finish_reason, stop_reason)
    assert is_empty(engine)


# Log-probabilities ------------------------------------------------------------------------------------------------


def test_the_token_comes_first_then_the_candidates_by_rank() -> None:
    engine, _ = scripted(lambda sequence, number: 2 - number)
    deltas = ask(engine, max_tokens=2, logprobs=2)
    text = {i: get_tokenizer().decode([i]) for i in (1, 2)}
    one, two = Logprob(-1.0, 1, text[1]), Logprob(-2.0, 2, text[2])
    own = [delta.logprobs[0] for delta in deltas if delta.logprobs]
    assert [list(each.items()) for each in own] == [
        [(2, Logprob(-0.5, 2, text[2])), (1, one)],
        [(1, Logprob(-0.5, 2, text[1])), (2, two)],
    ]
    assert [delta.cumulative_logprob for delta in deltas] == [-0.5, -1.0]


def test_log_probabilities_come_where_they_are_asked_for() -> None:
    engine, _ = scripted(counting)
    assert [delta.logprobs for delta in ask(engine, max_tokens=2)] == [None, None]
    assert [delta.prompt_logprobs for delta in ask(engine, max_tokens=2)] == [None, None]
    assert [list(d.logprobs[0]) for d in ask(engine, max_tokens=2, logprobs=0) if d.logprobs] == [[10], [11]]


def test_a_control_token_is_spelled_out_beside_its_log_probability() -> None:
    engine, _ = writing("")
    (delta,) = ask(engine, logprobs=0)
    eos = get_tokenizer().eos_id
    assert delta.logprobs == [{eos: Logprob(-0.5, 2, get_tokenizer().eos_token)}] and delta.text == ""


@pytest.mark.parametrize("num_tokens", [1, 2, 64, 65, 150])
def test_a_prompts_log_probabilities_come_once_with_the_first_delta_of_sequence_0(num_tokens: int) -> None:
    engine, _ = scripted(counting)
    prompt = list(range(100, 100 + num_tokens))
    deltas = ask(engine, prompt, n=2, max_tokens=2, prompt_logprobs=0)
    (described,) = (d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None)
    assert described is deltas[0].prompt_logprobs and deltas[0].index == 0
    assert described[0] is None
    assert [list(each) for each in described[1:] if each] == [[i] for i in prompt[1:]]
    assert [each[i].logprob for i, each in zip(prompt[1:], described[1:], strict=True) if each] == [
        -float(p) for p in range(1, num_tokens)
    ]


def test_a_prompt_that_is_preempted_is_described_once() -> None:
    engine, _ = scripted(counting, num_pages=5, max_num_batched_tokens=3, max_num_seqs=2)
    first = engine.add([5] * (PAGE_SIZE - 1), SamplingParams(max_tokens=2 * PAGE_SIZE))
    prompt = list(range(190))
    second = engine.add(prompt, SamplingParams(max_tokens=3, prompt_logprobs=0))
    deltas = [delta for delta in run(engine) if delta.request_id == second.id]
    assert first.sequences[0].num_preemptions == 0 < second.sequences[0].num_preemptions
    (described,) = (d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None)
    assert [each and list(each) for each in described] == [None, *([i] for i in prompt[1:])]


# Departures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(4))
def test_of_an_aborted_request_nothing_more_is_said_and_others_go_on(num_steps: int) -> None:
    engine, _ = scripted(counting)
    for name in "ab":
        engine.add([5], SamplingParams(max_tokens=4), name)
    before = run(engine, num_steps)
    for name in ("a", "a", "unknown"):
        engine.abort(name)
    after = run(engine)
    assert {delta.request_id for delta in after} == {"b"}
    assert sum((d.token_ids for d in before + after if d.request_id == "b"), []) == [10, 11, 12, 13]
    assert is_empty(engine)


def test_the_id_of_an_aborted_request_is_free_at_once_and_its_steps_say_nothing_of_the_next() -> None:
    engine, _ = scripted(lambda sequence, number: sequence.token_ids[0] + number)
    engine.add([5], SamplingParams(max_tokens=9, prompt_logprobs=0), "a")
    engine.step()
    engine.abort("a")
    engine.add([50, 51], SamplingParams(max_tokens=2, prompt_logprobs=0), "a")
    deltas = run(engine)
    assert [delta.token_ids for delta in deltas] == [[50], [51]]
    assert deltas[0].prompt_logprobs == [None, {51: Logprob(-1.0, 1, get_tokenizer().decode([51]))}]


@pytest.mark.parametrize("fails_at", ["launch 0", "launch 1", "results 0", "launch 2", "results 1", "results 4"])
def test_a_step_that_fails_ends_its_requests_and_no_others(fails_at: str) -> None:
    engine, runner = scripted(counting, max_num_seqs=2)
    for name in "abc":
        engine.add([5] * PAGE_SIZE, SamplingParams(max_tokens=9, n=2 if name == "a" else 1), name)
    runner.fails_at = fails_at
    with pytest.raises(RuntimeError, match=fails_at):
        run(engine)
    assert engine.scheduler.pool.num_available == 20 and not engine.scheduler.num_in_flight
    deltas = run(engine)
    ended = [(d.request_id, d.index, d.token_ids) for d in deltas if d.finish_reason == "abort"]
    assert ended == [("a", 0, []), ("a", 1, [])]
    assert {d.request_id for d in deltas if d.finish_reason == "length"} == {"b", "c"}
    assert is_empty(engine)


def test_pages_of_a_failed_step_are_not_read_by_others() -> None:
    engine, runner = scripted(counting)
    runner.fails_at = "results 0"
    with pytest.raises(RuntimeError):
        ask(engine, [5] * 100)
    run(engine)
    assert ask(engine, [5] * 100)[0].num_cached_tokens == 0
    assert ask(engine, [5] * 100)[0].num_cached_tokens == PAGE_SIZE


def test_held_back_text_of_a_failed_request_is_said_with_its_end_unless_it_is_aborted() -> None:
    for is_aborted in (False, True):
        engine, runner = writing("one, two")
        runner.fails_at = "results 2"
        request = engine.add("a", SamplingParams(stop="ones"))
        with pytest.raises(RuntimeError):
            run(engine)
        if is_aborted:
            engine.abort(request.id)
        assert engine.has_unfinished is not is_aborted
        assert [(delta.text, delta.finish_reason) for delta in run(engine)] == [("on", "abort")] * (not is_aborted)


def test_ten_thousand_requests_with_cancellations_and_failures_leave_nothing_behind() -> None:
    rng = random.Random(0)
    engine, runner = scripted(counting, num_pages=60, max_num_seqs=24, max_num_batched_tokens=512)
    beginnings = [rng.choices(range(200), k=PAGE_SIZE * n) for n in range(4)]
    num_open: dict[str, int] = {}
    reasons = set()

    def step() -> None:
        try:
            deltas = engine.step()
        except RuntimeError:
            return
        for delta in deltas:
            if delta.finish_reason:
                reasons.add(delta.finish_reason)
                num_open[delta.request_id] -= 1

    for i in range(10_000):
        prompt = rng.choice(beginnings) + rng.choices(range(200), k=3)
        params = SamplingParams(max_tokens=rng.randint(1, 6), n=rng.choice([1, 1, 1, 2]), stop=rng.choice([(), "-"]))
        num_open[engine.add(prompt, params).id] = params.n
        if rng.random() < 0.1:
            name = rng.choice(list(num_open)[-40:])
            engine.abort(name)
            num_open[name] = 0
        if i % 500 == 0:
            number = int(runner.events[-1].split()[1]) if runner.events else 0
            runner.fails_at = rng.choice([f"launch {number + 2}", f"results {number + 1}"])
        step()
    while engine.has_unfinished:
        step()
    assert is_empty(engine) and set(num_open.values()) == {0}
    assert reasons == {"abort", "length", "stop"}


# Requests ---------------------------------------------------------------------------------------------------------


def test_requests_without_an_id_get_one_that_is_free() -> None:
    engine, _ = scripted(counting)
    params = SamplingParams(max_tokens=1)
    assert [engine.add([1], params, name).id for name in ("1", None, None)] == ["1", "0", "2"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "request 'b': prompt is empty"),
        ("", {}, "request 'b': prompt is empty"),
        ([1] * 400, {}, "a prompt of 400 tokens leaves no room for output"),
        ([1, 1000], {}, "request 'b': token id 1000 is outside the vocabulary of"),
        ([1], {"stop_token_ids": [1000]}, "stop_token_ids: id 1000 is outside the vocabulary of"),
    ],
)
def test_a_request_that_is_refused_leaves_others_as_they_are(prompt: Any, params: dict[str, Any], message: str) -> None:
    engine, _ = scripted(counting)
    engine.add([1], SamplingParams(max_tokens=3), "a")
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, SamplingParams(**params), "b")
    assert sum((delta.token_ids for delta in run(engine)), []) == [10, 11, 12] and is_empty(engine)


def test_an_id_that_is_in_use_is_refused_and_its_request_goes_on() -> None:
    engine, _ = scripted(counting)
    engine.add([1], SamplingParams(max_tokens=3), "a")
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add([2], SamplingParams(), "a")
    assert sum((delta.token_ids for delta in run(engine)), []) == [10, 11, 12] and is_empty(engine)


def test_prefixes_are_forgotten_for_new_parameters_once_nothing_runs() -> None:
    engine, _ = scripted(counting)
    ask(engine, [5] * 100)
    engine.add([5] * 100, SamplingParams(max_tokens=3))
    assert engine.step()[0].num_cached_tokens == PAGE_SIZE
    with pytest.raises(ValueError, match="pages are in use"):
        engine.refresh()
    run(engine)
    engine.refresh()
    assert ask(engine, [5] * 100)[0].num_cached_tokens == 0


def test_outputs_drafts_and_stop_strings_need_no_torch() -> None:
    code = "import sys, dsv2.engine.ngram, dsv2.engine.outputs, dsv2.engine.stops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
