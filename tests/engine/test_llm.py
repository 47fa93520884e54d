"""`LLM` end to end on small models: whom a draw depends on, what requests may ask for, texts, bad input and bad luck.

Greedy output under any schedule is in test_schedules.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from typing import Any, cast

import pytest
import torch

import dsv2
from dsv2.config import EngineConfig
from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.generate import Sampling, generate
from dsv2.engine.llm import LLM
from dsv2.engine.outputs import RequestOutput
from dsv2.engine.paged import CPU_CACHE_BYTES, default_num_pages, page_bytes
from dsv2.engine.runner import Drawn, Results, Ticket
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.scheduler import Step
from dsv2.model import Transformer
from dsv2.text import Tokenizer, encode_chat
from tests.engine.recomputed import KINDS, Recorder, expected_of, get_model, prompts_of, recompute
from tests.numerics import SMALL_MODELS, random_model

SHORT = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


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


# The same function ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_changes_no_draw(kind):
    prompts = [[*SHORT[2], 5, 6, 7] * 3, [9, 8] * 5, SHORT[0]]
    # So cold, and from so few, that outputs repeat themselves.
    params = SamplingParams(temperature=0.5, top_k=4, seed=2, max_tokens=40, ignore_eos=True, n=2)
    answers, seen = [], Counter[str]()
    for num_draft_tokens in (0, 4):
        llm = small_llm(get_model(kind), num_draft_tokens=num_draft_tokens)
        Recorder(llm.engine, seen)
        answers.append([[c.token_ids for c in output.outputs] for output in llm.generate(prompts, params)])
    assert answers[0] == answers[1] and seen["drafts"] > 20


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


def check_described(described: Any, token_id: int, log_probs_W: torch.Tensor, num_candidates: int) -> None:
    """The token itself, then the most probable ones, as the model says."""
    best = log_probs_W.topk(num_candidates)
    ids = [token_id, *(i for i in best.indices.tolist() if i != token_id)]
    assert list(described) == ids
    for i, each in described.items():
        assert each.logprob == pytest.approx(float(log_probs_W[i]), abs=1e-5)
        assert each.rank == 1 + int((log_probs_W > log_probs_W[i]).sum())
        assert each.decoded_token == ""


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
@torch.inference_mode()
def test_log_probabilities_of_prompt_and_output_are_the_trainers(lite, num_draft_tokens):
    llm = small_llm(lite, num_draft_tokens=num_draft_tokens, num_pages=6)
    params = SamplingParams(
        max_tokens=12, seed=1, top_k=3, ignore_eos=True, logprobs=3, prompt_logprobs=2, logit_bias={5: -9}, n=2
    )
    prompts = [SHORT[2], prompts_of("v2-lite")[5], [7]]
    for output in llm.generate([*prompts, SHORT[1]], [params, params, params, GREEDY])[:3]:
        prompt = output.prompt_token_ids
        for completion in output.outputs:
            log_probs_TW = lite(torch.tensor(prompt + completion.token_ids)).log_softmax(-1)
            assert completion.logprobs is not None and len(completion.logprobs) == 12
            for p, described in enumerate(completion.logprobs, len(prompt)):
                check_described(described, completion.token_ids[p - len(prompt)], log_probs_TW[p - 1], 3)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for p, described in enumerate(output.prompt_logprobs[1:], 1):
            check_described(described, prompt[p], log_probs_TW[p - 1], 2)


def test_log_probabilities_come_where_they_are_asked_for(lite):
    outputs = small_llm(lite).generate(SHORT[:2], [GREEDY, dataclasses.replace(GREEDY, logprobs=0)])
    assert [output.prompt_logprobs for output in outputs] == [None, None]
    plain, described = (output.outputs[0] for output in outputs)
    assert plain.logprobs is None and described.logprobs is not None
    assert [list(each) for each in described.logprobs] == [[i] for i in described.token_ids]


def test_prompt_tokens_found_in_the_cache_are_counted(lite):
    llm, prompt = small_llm(lite), prompts_of("v2-lite")[5]
    assert [llm.generate(prompt, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, PAGE_SIZE]


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

    class Scripted:
        def __init__(self, step: Step, *args: Any) -> None:
            numbers = [e.start + e.num_tokens - e.sequence.num_prompt_tokens if e.samples else -1 for e in step.entries]
            drawn = [[Drawn(script[min(i, len(script) - 1)], -1.0)] if i >= 0 else [] for i in numbers]
            self._results = Results(drawn, [None] * len(drawn))

        def results(self) -> Results:
            return self._results

    cast(Any, llm.engine.runner).launch = Scripted
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
    assert llm.engine.scheduler.pool.num_available == llm.engine.scheduler.pool.num_pages


def test_a_stop_string_ends_its_sequence_only():
    params = [SamplingParams(max_tokens=60, stop=stop) for stop in ("two", (), "four")]
    outputs = scripted(TEXT).generate(["a", "b", "c"], params)
    assert [output.outputs[0].text for output in outputs] == ["one, ", TEXT, "one, two; 三 😀 "]


def test_what_ended_an_answer_is_said():
    params = [
        SamplingParams(max_tokens=60),
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=60, stop=["x", "two"]),
        SamplingParams(max_tokens=60, stop_token_ids=get_tokenizer().encode(",")),
    ]
    outputs = scripted(TEXT).generate(["a"] * 4, params)
    assert [output.outputs[0].stop_reason for output in outputs] == [None, None, "two", *params[3].stop_token_ids]


def test_progress_is_shown_where_it_is_asked_for(capsys):
    llm = scripted(TEXT)
    llm.generate(["a", "b"])
    llm.chat([{"role": "user", "content": "fox?"}])
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "100%" in err and "tokens/s" in err


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
        ([1, 2], SamplingParams(logit_bias={512: 1}), "logit_bias: id 512 is outside the vocabulary of 512"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_stays_behind(lite, prompts, params, message):
    llm = small_llm(lite, num_pages=2)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not llm.engine.scheduler.has_unfinished
    assert token_ids(llm.generate([SHORT[0]], GREEDY)) == [recompute(lite, SHORT[0], 8)[0]]


def test_an_engine_with_requests_of_others_is_left_alone(lite):
    llm = small_llm(lite)
    llm.engine.add(SHORT[0], GREEDY, "other")
    with pytest.raises(ValueError, match="the engine has requests of others"):
        llm.generate(SHORT[1], GREEDY)
    assert (
        sum((delta.token_ids for _ in range(8) for delta in llm.engine.step()), []) == recompute(lite, SHORT[0], 8)[0]
    )


def test_what_failed_before_a_call_is_no_part_of_it(lite, monkeypatch):
    llm = small_llm(lite)
    llm.engine.add(SHORT[0], GREEDY, "other")
    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "results", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.engine.step()
    assert token_ids(llm.generate(SHORT[1], GREEDY)) == [recompute(lite, SHORT[1], 8)[0]]


def test_no_prompts_give_no_outputs(lite):
    assert small_llm(lite).generate([]) == []


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        scripted("yes").generate("")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 1}, "engine.max_model_len=1 must be at least 2"),
        ({"num_draft_tokens": 8}, r"engine.num_draft_tokens=8 must be in 0\.\.7"),
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
@pytest.mark.parametrize("where", ["launch", "results"])
def test_an_interrupted_call_leaves_a_working_engine(lite, monkeypatch, where, num_steps):
    llm = small_llm(lite, max_num_batched_tokens=40)
    remaining = iter(range(num_steps))
    owner = llm.engine.runner if where == "launch" else Ticket
    call = getattr(owner, where)

    def interrupted(*args: Any) -> Any:
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return call(*args)

    monkeypatch.setattr(owner, where, interrupted)
    prompts = prompts_of("v2-lite")[3:]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY)
    scheduler = llm.engine.scheduler
    assert scheduler.pool.num_available == scheduler.pool.num_pages
    assert not scheduler.num_in_flight and not llm.engine.has_unfinished
    monkeypatch.undo()
    assert token_ids(llm.generate(prompts, GREEDY)) == [ids[:8] for ids, _ in expected_of("v2-lite")[3:]]


def test_the_cache_is_one_allocation_as_large_as_needed_and_at_most_1_gb_on_the_cpu(lite):
    assert default_num_pages(EngineConfig(max_model_len=130, max_num_seqs=5), lite) == 15
    largest = default_num_pages(EngineConfig(max_model_len=163840), lite)
    assert largest * page_bytes(lite) <= CPU_CACHE_BYTES < (largest + 1) * page_bytes(lite)
    cache_LPX = small_llm(lite, num_pages=3).engine.runner.cache_LPX
    assert cache_LPX.shape[:3] == (lite.cfg.num_layers, 3, PAGE_SIZE)
    assert cache_LPX.nbytes == 3 * page_bytes(lite)
