"""A draft model changes when tokens come, and no token: whatever it is, and whatever becomes of the sequences."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dsv2.config import EngineConfig
from dsv2.config.engine import PAGE_SIZE
from dsv2.engine import runner
from dsv2.engine.core import DraftCounts, Engine
from dsv2.engine.llm import LLM
from dsv2.engine.outputs import RequestOutput
from dsv2.engine.paged import CPU_CACHE_BYTES, allocate_pages, default_num_pages, page_bytes
from dsv2.engine.sampling import SamplingParams
from dsv2.model import Transformer
from dsv2.weights import save
from tests.engine.recomputed import KINDS, Recorder, get_model, prompts_of
from tests.numerics import SMALL_MODELS, random_model

MAX_MODEL_LEN = 90
PROMPT = [5, 6, 7]
SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=25, ignore_eos=True)


@cache
def get_target() -> Transformer:
    return random_model(SMALL_MODELS["v2-lite"]().replace(num_layers=2, vocab_size=64, moe=None), seed=3)


@cache
def get_draft(kind: str) -> Transformer:
    """`kin` is often right, `other` and `llama` are by chance; the last has no absorbed form, and other pages."""
    if kind != "kin":
        name = "v2-lite" if kind == "other" else "llama"
        return random_model(SMALL_MODELS[name]().replace(num_layers=1, vocab_size=64), seed=9)
    model, generator = Transformer(get_target().cfg), torch.Generator().manual_seed(1)
    model.load_state_dict(get_target().state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
    return model.eval()


@pytest.fixture(autouse=True)
def poisoned_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody wrote is NaN, so that reading it shows."""
    monkeypatch.setattr(runner, "allocate_pages", lambda *args: [x.fill_(torch.nan) for x in allocate_pages(*args)])


def small_llm(model: Transformer | Path, **changes: Any) -> LLM:
    limits: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(model, **(limits | changes))


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


# Any schedule -----------------------------------------------------------------------------------------------------


@cache
def get_requests() -> list[tuple[list[int], SamplingParams]]:
    """Every kind of end and of sampling, after prompts that begin alike near the bounds of pages."""
    rng = random.Random(0)
    common = rng.choices(range(64), k=PAGE_SIZE)
    prompts = [[7], common[:57], common[:62], common, [*common, 1]]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 16, "ignore_eos": True},
        {"seed": 1, "max_tokens": 16, "ignore_eos": True},
        {"seed": 2, "max_tokens": None, "stop_token_ids": [9], "ignore_eos": True},
        {"seed": 3, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 12, "n": 2},
        {"seed": 4, "max_tokens": 16, "stop_token_ids": list(range(3, 7)), "min_tokens": 5},
        {"seed": 5, "max_tokens": 9, "logit_bias": {3: 2.0, 4: -50.0}, "ignore_eos": True},
        {"seed": 6, "max_tokens": 9, "frequency_penalty": 1.0, "ignore_eos": True},
    ]
    return [(prompt, SamplingParams(**params)) for prompt in prompts for params in kinds]


@cache
def get_expected() -> list[list[list[int]]]:
    """Without drafts, nor company: there is none of the same request."""
    llm = small_llm(get_target(), max_num_seqs=40, max_num_batched_tokens=512)
    outputs = llm.generate([prompt for prompt, _ in get_requests()], [params for _, params in get_requests()])
    return [token_ids([output]) for output in outputs]


def check_history(seed: int, seen: Counter[str]) -> None:
    """An engine of random limits and some draft model, and clients who come and go."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rng.randint(2, 5),
        max_num_batched_tokens=rng.choice([9, 33, 300]),
        num_pages=rng.choice([3, 3, 3, 20]),
        enable_prefix_caching=rng.random() < 0.8,
        num_draft_tokens=rng.choice([1, 3, 3, 7]),
        cudagraph_capture_sizes=rng.choice([None, (4,), (1, 6, 20)]),
    )
    engine = Engine(get_target(), None, config, get_draft(rng.choice(["kin", "kin", "other", "llama"])))
    Recorder(engine, seen)
    waiting = rng.choices(range(len(get_requests())), k=6)
    asked, answers, left = {}, {}, set()
    while waiting or engine.has_unfinished:
        if waiting and rng.random() < 0.4:
            name, i = str(len(asked)), waiting.pop()
            asked[name] = i
            prompt, params = get_requests()[i]
            answers |= {(name, index): [] for index in range(params.n)}
            engine.add(prompt, params, name)
        if asked and rng.random() < 0.02:
            name = rng.choice(list(asked))
            engine.abort(name)
            left.add(name)
        for delta in engine.step():
            answers[delta.request_id, delta.index] += delta.token_ids
            seen["several tokens at once"] += len(delta.token_ids) > 1
    for (name, index), answer in answers.items():
        expected = get_expected()[asked[name]][index]
        assert answer == (expected[: len(answer)] if name in left else expected), f"seed {seed}, request {name}"
    seen["departures"] += len(left)
    seen["accepted"] += engine.draft_counts.num_accepted_tokens
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


def test_outputs_are_those_without_a_draft_model_under_any_schedule() -> None:
    seen: Counter[str] = Counter()
    for seed in range(2, 10):
        check_history(seed, seen)
    for what in (
        "chunks",
        "prefill beside decode",
        "padded steps",
        "steps of resumed sequences",
        "prefix hits",
        "several tokens at once",
        "departures",
    ):
        assert seen[what] >= 3, f"{what}: {seen}"
    assert 0.2 < seen["accepted"] / seen["drafts"] < 0.8, f"drafts were too seldom right or wrong: {seen}"


# What is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_draft_tokens", "temperature"), [(1, 1.0), (4, 0.0), (7, 1.0)])
def test_of_a_draft_model_that_is_the_model_everything_is_accepted(kind, num_draft_tokens, temperature) -> None:
    model = get_model(kind)
    llm = small_llm(model, draft_model=model, num_draft_tokens=num_draft_tokens)
    launch, steps = llm.engine.runner.launch, []
    cast(Any, llm.engine.runner).launch = lambda step, *args: (steps.append(step), launch(step, *args))[1]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=25, ignore_eos=True)
    (ids,) = token_ids(llm.generate(prompts_of(kind)[1], params))
    counts = llm.engine.draft_counts
    # The prompt gives a token, and every step after it as many as it drafted and one more.
    assert len(ids) == 25 and len(steps) == 1 + -(-24 // (1 + num_draft_tokens))
    assert counts.num_accepted_tokens == counts.num_tokens == 25 - len(steps)


def test_everything_is_accepted_too_in_chunks_in_company_and_after_preemption() -> None:
    model, seen = get_target(), Counter[str]()
    limits = {"max_model_len": 150, "max_num_batched_tokens": 33, "num_pages": 4}
    llm = small_llm(model, draft_model=model, num_draft_tokens=3, **limits)
    Recorder(llm.engine, seen)
    page = random.Random(1).choices(range(64), k=PAGE_SIZE)
    # The second grows into the last page, which the first then needs.
    prompts = [page + page[:44], page[3:], [*page, 1], [*page, 2]]
    llm.generate(prompts, SamplingParams(seed=1, max_tokens=24, ignore_eos=True))
    assert llm.engine.draft_counts.num_accepted_tokens == seen["drafts"] > 30
    for what in ("chunks", "steps of resumed sequences", "prefix hits"):
        assert seen[what], f"{what}: {seen}"


def test_pages_that_drafts_filled_are_shared_complete() -> None:
    model, prompt = get_target(), list(range(60))
    for max_tokens in range(4, 9):  # the page ends with an accepted draft, a token of the model's or none
        llm = small_llm(model, draft_model=model, num_draft_tokens=3)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        longer = prompt + token_ids(llm.generate(prompt, params))[0] + [1, 2, 3]
        (output,) = llm.generate(longer, params)
        assert output.num_cached_tokens == (PAGE_SIZE if max_tokens > 4 else 0)
        assert token_ids([output]) == token_ids(small_llm(model).generate(longer, params))
        assert llm.engine.draft_counts.num_accepted_tokens == llm.engine.draft_counts.num_tokens


@pytest.mark.parametrize("kind", ["other", "llama"])
def test_an_unrelated_draft_model_is_seldom_right_and_the_text_is_the_same(kind: str) -> None:
    llm = small_llm(get_target(), draft_model=get_draft(kind), num_draft_tokens=4)
    assert token_ids(llm.generate(PROMPT, SAMPLED)) == token_ids(small_llm(get_target()).generate(PROMPT, SAMPLED))
    counts = llm.engine.draft_counts
    assert counts.num_drafts >= 10 and counts.num_accepted_tokens < 0.3 * counts.num_tokens


def test_random_numbers_in_common_make_similar_models_draw_alike() -> None:
    def accepted(shift: int) -> float:
        llm = small_llm(get_target(), draft_model=get_draft("kin"), num_draft_tokens=1)
        sampler = cast(Any, llm.engine.runner)._drafts._sampler
        draw = sampler.draw
        sampler.draw = lambda logits_NW, group, numbers, *rest: draw(logits_NW, group, numbers + shift, *rest)
        llm.generate([[i] for i in range(8)], SamplingParams(seed=3, max_tokens=9, ignore_eos=True))
        counts = llm.engine.draft_counts
        return counts.num_accepted_tokens / counts.num_tokens

    assert accepted(0) > 2 * accepted(1000)


@pytest.mark.parametrize("draft_kind", [None, "kin"])
def test_counts_of_drafts_add_up_to_the_tokens_that_came(draft_kind: str | None) -> None:
    draft = None if draft_kind is None else get_draft(draft_kind)
    engine = Engine(get_target(), None, EngineConfig(max_model_len=150, num_draft_tokens=3, num_pages=9), draft)
    seen, num_accepted = Counter[str](), 0
    Recorder(engine, seen)
    prompts = [[1, 2, 3] * 9, [4] * 20]  # for drafts of what repeats
    for prompt in prompts:
        engine.add(prompt, SamplingParams(temperature=0.2, seed=1, max_tokens=30, ignore_eos=True))
    while engine.has_unfinished:
        num_accepted += sum(len(delta.token_ids) - 1 for delta in engine.step())
    counts = engine.draft_counts
    assert (counts.num_tokens, counts.num_accepted_tokens) == (seen["drafts"], num_accepted)
    assert counts.num_tokens // 3 <= counts.num_drafts <= counts.num_tokens and num_accepted > 2


def test_without_speculation_nothing_is_counted() -> None:
    llm = small_llm(get_target())
    llm.generate(PROMPT, SAMPLED)
    assert llm.engine.draft_counts == DraftCounts()


# What a draft model is --------------------------------------------------------------------------------------------


def test_a_draft_model_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    save(get_target(), tmp_path / "model")
    save(get_draft("llama"), tmp_path / "draft")
    llm = small_llm(tmp_path / "model", draft_model=tmp_path / "draft", num_draft_tokens=2, device="cpu")
    assert token_ids(llm.generate(PROMPT, SAMPLED)) == token_ids(small_llm(get_target()).generate(PROMPT, SAMPLED))
    assert llm.engine.draft_counts.num_tokens > 0


@pytest.mark.parametrize(
    ("changes", "num_draft_tokens", "message"),
    [
        ({"vocab_size": 65}, 2, "draft_model has a vocabulary of 65 tokens, expected the model's 64"),
        ({"device": "meta"}, 2, "draft_model is on meta, expected the model's device, cpu"),
        ({}, 0, "num_draft_tokens=0 with a draft_model: expected 1 or more"),
    ],
    ids=["vocabulary", "device", "no-tokens"],
)
def test_a_draft_model_that_could_not_draft_is_refused(
    changes: dict[str, Any], num_draft_tokens: int, message: str
) -> None:
    with torch.device(changes.pop("device", "cpu")):
        draft = Transformer(get_draft("llama").cfg.replace(**changes))
    with pytest.raises(ValueError, match=message):
        small_llm(get_target(), draft_model=draft, num_draft_tokens=num_draft_tokens)


def test_pages_of_both_models_are_one_allocation_within_the_budget() -> None:
    models = get_target(), get_draft("llama")
    num_pages = default_num_pages(EngineConfig(max_model_len=163840), *models)
    assert page_bytes(*models) == page_bytes(models[0]) + page_bytes(models[1])
    assert num_pages * page_bytes(*models) <= CPU_CACHE_BYTES < (num_pages + 1) * page_bytes(*models)
    pages = allocate_pages(3, *models)
    assert [x.nbytes for x in pages] == [3 * page_bytes(model) for model in models]
    assert [x.shape[:3] for x in pages] == [(model.cfg.num_layers, 3, PAGE_SIZE) for model in models]
    assert pages[1].data_ptr() == pages[0].data_ptr() + pages[0].nbytes
