"""The engine says what plain recomputation says, whatever it does in between: batching, chunks, preemption, sharing."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

import dsv2
from dsv2.config import EngineConfig
from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.generate import Sampling, generate
from dsv2.engine.llm import LLM, RequestOutput, find_stop
from dsv2.engine.runner import CPU_CACHE_BYTES, Drawn, default_num_pages, page_bytes
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Step
from dsv2.model import Transformer
from dsv2.text import Tokenizer, encode_chat
from tests.numerics import SMALL_MODELS, random_model

KINDS = ["v2", "v2-lite", "llama", "mixtral"]
NUM_HISTORIES = 5
NUM_TOKENS = 70
SHORT = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

get_model = cache(lambda kind: random_model(SMALL_MODELS[kind](), seed=3))


@pytest.fixture
def lite() -> Transformer:
    return get_model("v2-lite")


@cache
def get_tokenizer() -> Tokenizer:
    return Tokenizer.train(["The quick brown fox jumps over the lazy dog. " * 3], 300)


def small_llm(model: Transformer, **changes: Any) -> LLM:
    limits: dict[str, Any] = {"max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(model, **(limits | changes))


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@torch.inference_mode()
def recompute(model: Transformer, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy ids and their log-probabilities, the whole sequence through the model for every token."""
    ids, log_probs = list(prompt), []
    for _ in range(num_tokens):
        log_probs_W = model(torch.tensor(ids))[-1].log_softmax(-1)
        ids.append(int(log_probs_W.argmax()))
        log_probs.append(float(log_probs_W.max()))
    return ids[len(prompt) :], log_probs


# The same function ------------------------------------------------------------------------------------------------


class Recorder:
    """Counts what the steps of an engine were like."""

    def __init__(self, llm: LLM, seen: Counter[str]) -> None:
        self.run_step, self.seen = llm.runner.run, seen
        llm.runner.run = self.run

    def run(self, step: Step) -> list[Drawn | None]:
        counts = {entry.num_tokens for entry in step.entries}
        self.seen["decodes of several sequences"] += counts == {1} and len(step.entries) > 1
        self.seen["prefill beside decode"] += 1 in counts and max(counts) > 8
        for entry in step.entries:
            self.seen["chunks"] += not entry.samples
            self.seen["steps of resumed sequences"] += entry.epoch > 0
            self.seen["prefix hits"] += not entry.epoch and entry.start == entry.sequence.num_cached_tokens > 0
        return self.run_step(step)


@cache
def prompts_of(kind: str) -> list[list[int]]:
    """Short ones, and some that begin alike, near the bounds of pages."""
    rng, vocab_size = random.Random(0), get_model(kind).cfg.vocab_size

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    common = ids(PAGE_SIZE)
    return [[7], ids(50), ids(62), common, common + ids(1), common + ids(59)]


@cache
def expected_of(kind: str) -> list[tuple[list[int], list[float]]]:
    return [recompute(get_model(kind), prompt, NUM_TOKENS) for prompt in prompts_of(kind)]


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
    )
    Recorder(llm, seen)
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
        assert llm.scheduler.pool.num_available == llm.scheduler.pool.num_pages


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
def test_greedy_output_is_that_of_recomputing_everything_under_any_limits(kind):
    seen: Counter[str] = Counter()
    for seed in range(NUM_HISTORIES):
        check_history(kind, seed, seen)
    for what in (
        "decodes of several sequences",
        "prefill beside decode",
        "chunks",
        "steps of resumed sequences",
        "prefix hits",
    ):
        assert seen[what] >= 5, f"{what}: {seen}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_sequence_draws_the_same_in_any_company(kind):
    model, prompt = get_model(kind), prompts_of(kind)[5]
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=11, max_tokens=20, ignore_eos=True)
    alone = token_ids(small_llm(model).generate(prompt, params))[0]
    others = [SamplingParams(seed=i, max_tokens=30, frequency_penalty=1, logit_bias={3: 5}) for i in range(4)]
    crowd = small_llm(model, max_num_batched_tokens=8, num_pages=5)
    beside = crowd.generate([*prompts_of(kind)[2:6], prompt], [*others, params])
    assert token_ids(beside)[-1] == alone


def test_one_sequence_draws_what_plain_generation_draws(lite):
    plain = generate(lite, [SHORT[2]], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=5), stop_ids=[])
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    assert token_ids(small_llm(lite).generate([SHORT[2]], params)) == plain


def test_sample_i_of_n_draws_by_the_seed_plus_i(lite):
    llm = small_llm(lite)
    (output,) = llm.generate(SHORT[0], SamplingParams(seed=2**63 - 2, n=3, max_tokens=9, ignore_eos=True))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for completion, seed in zip(output.outputs, (2**63 - 2, 2**63 - 1, -(2**63)), strict=True):
        params = SamplingParams(seed=seed, max_tokens=9, ignore_eos=True)
        assert token_ids(llm.generate(SHORT[0], params)) == [completion.token_ids]


def test_without_a_seed_sequences_differ_and_a_new_engine_repeats_them(lite):
    def run() -> list[list[int]]:
        (output,) = small_llm(lite).generate(SHORT[0], SamplingParams(n=3, max_tokens=9, ignore_eos=True))
        return [completion.token_ids for completion in output.outputs]

    assert run() == run()
    assert len(set(map(tuple, run()))) == 3


def test_outputs_come_in_the_order_of_the_prompts(lite):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 1, 7)]
    outputs = small_llm(lite, max_num_seqs=2).generate(SHORT, params)
    assert [output.prompt_token_ids for output in outputs] == SHORT
    assert [len(ids) for ids in token_ids(outputs)] == [20, 1, 7]
    assert len({output.request_id for output in outputs}) == 3


def test_the_trainers_parameters_are_used_as_they_are_after_refresh():
    model, prompt = random_model(SMALL_MODELS["v2-lite"](), seed=5), prompts_of("v2-lite")[5]
    llm = small_llm(model)
    before = token_ids(llm.generate(prompt, GREEDY))[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    llm.refresh()
    after = token_ids(llm.generate(prompt, GREEDY))[0]
    assert after == recompute(model, prompt, 8)[0] != before


# What requests ask for --------------------------------------------------------------------------------------------


def test_eos_ends_a_sequence_unless_ignored_or_too_early(lite):
    free = recompute(lite, SHORT[2], 12)[0]
    eos = free[3]
    assert eos not in free[:3]
    model = Transformer(lite.cfg.replace(eos_token_id=(511, eos)))
    model.load_state_dict(lite.state_dict())
    llm = small_llm(model)

    def run(**changes: Any) -> tuple[list[int], str]:
        params = SamplingParams(temperature=0, max_tokens=12, **changes)
        completion = llm.generate(SHORT[2], params)[0].outputs[0]
        return completion.token_ids, completion.finish_reason

    assert run() == (free[:4], "stop")
    assert run(ignore_eos=True) == (free, "length")
    assert run(ignore_eos=True, min_tokens=12) == (free, "length")
    ids, _ = run(min_tokens=6)
    assert ids[:3] == free[:3] and eos not in ids[:6] and len(ids) > 6
    assert eos not in run(min_tokens=12)[0]
    assert run(ignore_eos=True, min_tokens=4, stop_token_ids=[free[1]])[0][0] == free[0]
    assert free[1] not in run(ignore_eos=True, min_tokens=4, stop_token_ids=[free[1]])[0][:4]


def test_max_model_len_ends_a_sequence(lite):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = small_llm(lite, max_model_len=20).generate(SHORT[2], params)
    assert output.outputs[0].token_ids == recompute(lite, SHORT[2], 6)[0]
    assert output.outputs[0].finish_reason == "length"


def test_bias_moves_the_choice_and_log_probabilities_stay_the_models_own(lite):
    ids, log_probs = recompute(lite, SHORT[0], 1)
    llm = small_llm(lite)
    chosen = llm.generate(SHORT[0], SamplingParams(max_tokens=4, ignore_eos=True, logit_bias={77: 100}))[0].outputs[0]
    assert chosen.token_ids == [77] * 4
    forced = torch.tensor(SHORT[0] + [77] * 4)
    own = lite(forced).log_softmax(-1)[len(SHORT[0]) - 1 : -1, 77].sum().item()
    assert chosen.cumulative_logprob == pytest.approx(own, rel=1e-5)
    banned = SamplingParams(temperature=0, max_tokens=1, logit_bias={ids[0]: -100})
    outputs = llm.generate([SHORT[0]] * 2, [banned, SamplingParams(temperature=0, max_tokens=1)])
    assert token_ids(outputs)[0] != ids and token_ids(outputs)[1] == ids
    assert outputs[1].outputs[0].cumulative_logprob == pytest.approx(log_probs[0], rel=1e-5)


def penalised(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy with a repetition penalty of 1.5, a frequency penalty of 0.5 and a presence penalty of 1."""
    ids = list(prompt)
    for _ in range(num_tokens):
        logits_W = model(torch.tensor(ids))[-1].detach()
        for i in set(ids):
            logits_W[i] = logits_W[i] / 1.5 if logits_W[i] > 0 else logits_W[i] * 1.5
        for i in ids[len(prompt) :]:
            logits_W[i] -= 0.5
        for i in set(ids[len(prompt) :]):
            logits_W[i] -= 1
        ids.append(int(logits_W.argmax()))
    return ids[len(prompt) :]


def test_penalties_count_prompt_and_output_of_their_own_sequence(lite):
    params = SamplingParams(
        temperature=0,
        max_tokens=8,
        ignore_eos=True,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=1,
    )
    outputs = small_llm(lite).generate(SHORT, [params, GREEDY, params])
    expected = [penalised(lite, SHORT[0], 8), recompute(lite, SHORT[1], 8)[0], penalised(lite, SHORT[2], 8)]
    assert token_ids(outputs) == expected
    assert expected[0] != recompute(lite, SHORT[0], 8)[0]


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_temperatures_beyond_fp32_are_the_nearest_that_it_has(lite, temperature):
    params = SamplingParams(temperature=temperature, top_k=1, max_tokens=8, ignore_eos=True)
    assert token_ids(small_llm(lite).generate(SHORT[0], params)) == [recompute(lite, SHORT[0], 8)[0]]


# Text -------------------------------------------------------------------------------------------------------------


def scripted(text: str, **changes: Any) -> LLM:
    """An engine whose model answers every prompt with the bytes of `text`, then eos."""
    tokenizer = get_tokenizer()
    script = [*(i for char in text for i in tokenizer.encode(char)), tokenizer.eos_id]
    cfg = SMALL_MODELS["llama"]().replace(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    llm = small_llm(random_model(cfg), tokenizer=tokenizer, **changes)

    def run(step: Step) -> list[Drawn | None]:
        return [Drawn(script[e.sequence.num_output_tokens], -1.0) if e.samples else None for e in step.entries]

    llm.runner.run = run
    return llm


TEXT = "one, two; 三 😀 four"


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({}, TEXT, "stop"),
        ({"max_tokens": 8}, "one, two", "length"),
        ({"stop": ", t"}, "one", "stop"),
        ({"stop": ["absent", "two"]}, "one, ", "stop"),
        ({"stop": "two", "include_stop_str_in_output": True}, "one, two", "stop"),
        ({"stop": "two", "max_tokens": 8}, "one, ", "stop"),
        ({"stop": "three"}, TEXT, "stop"),
        ({"stop": "😀 f"}, "one, two; 三 ", "stop"),
        ({"stop": "one", "min_tokens": 3}, TEXT, "stop"),
        ({"stop": "one", "min_tokens": 2}, "", "stop"),
        ({"max_tokens": 11}, "one, two; \N{REPLACEMENT CHARACTER}", "length"),
        ({"stop_token_ids": [44]}, TEXT, "stop"),
        ({"skip_special_tokens": False}, TEXT, "stop"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, TEXT + "<｜end▁of▁sentence｜>", "stop"),
    ],
)
def test_text_ends_where_stop_strings_stop_tokens_and_lengths_say(changes, text, reason):
    llm = scripted(TEXT)
    (output,) = llm.generate("a", SamplingParams(**({"max_tokens": 60} | changes)))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text, reason)
    assert output.outputs[0].cumulative_logprob == -len(output.outputs[0].token_ids)
    assert llm.scheduler.pool.num_available == llm.scheduler.pool.num_pages


@pytest.mark.parametrize(
    ("text", "num_before", "stops", "bounds"),
    [
        ("abc", 0, ["abc", "b"], (1, 2)),
        ("abc", 0, ["bc", "c"], (1, 3)),
        ("abcb", 2, ["b"], (3, 4)),
        ("abab", 3, ["ab"], (2, 4)),
        ("ab", 2, ["ab"], None),
        ("", 0, ["a"], None),
        ("abc", 0, [], None),
    ],
)
def test_the_first_stop_string_to_be_complete_is_found(text, num_before, stops, bounds):
    assert find_stop(text, num_before, stops) == bounds


def test_a_stop_string_ends_its_sequence_only():
    params = [SamplingParams(max_tokens=60, stop=stop) for stop in ("two", (), "four")]
    outputs = scripted(TEXT).generate(["a", "b", "c"], params)
    assert [output.outputs[0].text for output in outputs] == ["one, ", TEXT, "one, two; 三 😀 "]


def test_prompts_of_text_and_of_ids_and_conversations_are_understood():
    llm, tokenizer = scripted("yes"), get_tokenizer()
    outputs = llm.generate(["fox", [1, 2]], SamplingParams(max_tokens=2))
    assert [o.prompt_token_ids for o in outputs] == [tokenizer.encode("fox", add_bos=True), [1, 2]]
    assert llm.generate("fox")[0].prompt_token_ids == tokenizer.encode("fox", add_bos=True)
    messages = [{"role": "user", "content": "fox?"}]
    (output,) = llm.chat(messages)
    assert output.prompt_token_ids == encode_chat(tokenizer, messages)
    assert output.outputs[0].text == "yes"
    assert [o.prompt_token_ids for o in llm.chat([messages, messages])] == [output.prompt_token_ids] * 2


def test_a_checkpoint_on_disk_is_read_with_its_tokenizer(tmp_path):
    tokenizer = get_tokenizer()
    model = random_model(SMALL_MODELS["llama"]().replace(vocab_size=tokenizer.vocab_size))
    dsv2.save(model, tmp_path / "model", tokenizer)
    llm = dsv2.LLM(tmp_path / "model", device="cpu", dtype="float32", max_model_len=100)
    (output,) = llm.generate("fox", GREEDY)
    assert output.outputs[0].token_ids == recompute(model, output.prompt_token_ids, 8)[0]
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)


# Bad input and bad luck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1, 2], []], GREEDY, "request '1': prompt is empty"),
        ([[1, 2], [512]], GREEDY, "token id 512 is outside the vocabulary of 512"),
        ([[1, 2], [3, -1]], GREEDY, "token id -1 must not be negative"),
        ([[1, 2], [1] * 160], GREEDY, "a prompt of 160 tokens leaves no room for output, expected at most 159"),
        ([[1, 2], [1] * 100], SamplingParams(max_tokens=60), "the cache has 2: max_tokens=29 would fit"),
        (["fox"], GREEDY, "prompt is text, which needs a tokenizer"),
        ([[1, 2], [0.5]], GREEDY, "prompt must be token ids"),
        ([[1, 2], [3]], [GREEDY], "1 sampling params for 2 prompts"),
        ([1, 2], SamplingParams(stop="x"), "stop is text, which needs a tokenizer"),
        ([1, 2], SamplingParams(logprobs=0), "logprobs=0 is not supported yet"),
        ([1, 2], SamplingParams(prompt_logprobs=3), "prompt_logprobs=3 is not supported yet"),
        ([1, 2], SamplingParams(logit_bias={512: 1}), "logit_bias: id 512 is outside the vocabulary of 512"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_stays_behind(lite, prompts, params, message):
    llm = small_llm(lite, num_pages=2)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not llm.scheduler.has_unfinished
    assert token_ids(llm.generate([SHORT[0]], GREEDY)) == [recompute(lite, SHORT[0], 8)[0]]


def test_no_prompts_give_no_outputs(lite):
    assert small_llm(lite).generate([]) == []


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        scripted("yes").generate("")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 1}, "engine.max_model_len=1 must be at least 2"),
        ({"num_pages": 0}, "engine.num_pages=0 must be positive"),
        ({"dtype": "bfloat16"}, "dtype=torch.bfloat16 is not the model's, which is torch.float32"),
        ({"dtype": "int3"}, "dtype 'int3' must be one of"),
        ({"device": "nowhere"}, "device 'nowhere' is not one that torch knows"),
    ],
)
def test_limits_that_make_no_engine_are_refused(lite, changes, message):
    with pytest.raises(ValueError, match=message):
        small_llm(lite, **changes)


def test_chat_without_a_tokenizer_is_refused(lite):
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        small_llm(lite).chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_interrupted_call_leaves_a_working_engine(lite, num_steps):
    llm = small_llm(lite, max_num_batched_tokens=40)
    run, remaining = llm.runner.run, iter(range(num_steps))

    def interrupted(step: Step) -> list[Drawn | None]:
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return run(step)

    llm.runner.run = interrupted
    prompts = prompts_of("v2-lite")[3:]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY)
    assert llm.scheduler.pool.num_available == llm.scheduler.pool.num_pages
    assert not llm.scheduler.num_in_flight
    llm.runner.run = run
    assert token_ids(llm.generate(prompts, GREEDY)) == [ids[:8] for ids, _ in expected_of("v2-lite")[3:]]


def test_the_cache_is_one_allocation_as_large_as_needed_and_at_most_1_gb_on_the_cpu(lite):
    assert default_num_pages(lite, EngineConfig(max_model_len=130, max_num_seqs=5)) == 15
    largest = default_num_pages(lite, EngineConfig(max_model_len=163840))
    assert largest * page_bytes(lite) <= CPU_CACHE_BYTES < (largest + 1) * page_bytes(lite)
    cache_LPX = small_llm(lite, num_pages=3).runner.cache_LPX
    assert cache_LPX.shape[:3] == (lite.cfg.num_layers, 3, PAGE_SIZE)
    assert cache_LPX.nbytes == 3 * page_bytes(lite)
