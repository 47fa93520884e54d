"""Output of a given form through the whole engine: beside others, too costly, refused."""

from __future__ import annotations

import json

import pytest

from dsv2.config import EngineConfig
from dsv2.engine.core import Engine
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.structured import Matcher, StructuredOutputs
from dsv2.text import Tokenizer
from tests.numerics import SMALL_MODELS, random_model


def test_output_has_the_form_that_was_asked_for_whatever_else_runs():
    engine = structured_engine()
    choice = StructuredOutputs(choice=["brown fox", "lazy dog"])
    schema = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=60, structured_outputs=choice, n=3),
        SamplingParams(temperature=1.0, seed=2, max_tokens=60, structured_outputs=schema),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True),
    ]
    ids = [engine.add("The quick", each).id for each in params]
    texts: dict[tuple[str, int], str] = {}
    reasons: dict[tuple[str, int], str | None] = {}
    while engine.has_unfinished:
        for delta in engine.step():
            key = delta.request_id, delta.index
            texts[key] = texts.get(key, "") + delta.text
            reasons[key] = delta.finish_reason
    assert all(texts[ids[0], i] in ("brown fox", "lazy dog") for i in range(3))
    if reasons[ids[1], 0] == "stop":
        assert isinstance(json.loads(texts[ids[1], 0])["a"], int)
    assert reasons[ids[2], 0] == "length"
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


def test_a_form_that_grows_too_costly_ends_its_own_sequence_only(monkeypatch):
    engine = structured_engine()
    costly = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputs(regex="[a-z ]{30}"))
    first, other = engine.add("The quick", costly), engine.add("The", SamplingParams(max_tokens=5, ignore_eos=True))

    def refuse(_: Matcher, token_id: int) -> None:
        raise ValueError("too costly")

    monkeypatch.setattr(Matcher, "accept", refuse)
    reasons = {}
    while engine.has_unfinished:
        reasons |= {delta.request_id: delta.finish_reason for delta in engine.step()}
    assert reasons == {first.id: "abort", other.id: "length"}
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structured_outputs": StructuredOutputs(regex="(")}, r"structured_outputs\.regex"),
        ({"structured_outputs": StructuredOutputs(regex="a"), "min_tokens": 2}, "min_tokens=2 with structured_outputs"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused_and_leaves_nothing(changes, message):
    engine = structured_engine()
    with pytest.raises(ValueError, match=message):
        engine.add("The", SamplingParams(max_tokens=4, **changes))
    assert not engine.has_unfinished


def structured_engine() -> Engine:
    tokenizer = Tokenizer.train(["The quick brown fox jumps over the lazy dog. " * 3], 300)
    model = random_model(SMALL_MODELS["v2-lite"](), seed=3)
    config = EngineConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, num_pages=24)
    return Engine(model, tokenizer, config)
