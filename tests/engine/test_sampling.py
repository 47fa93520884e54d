"""What a request may ask and an engine be limited to: vLLM's names, and a ValueError that names whatever is wrong."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.config.engine import EngineConfig
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.structured import StructuredOutputs

_settings = settings(derandomize=True, database=None, max_examples=300, deadline=None)

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
LISTS = ("stop", "stop_token_ids", "logit_bias")


def params(**fields: Any) -> SamplingParams:
    """With values of any type, as they come from JSON."""
    return SamplingParams(**fields)


def test_defaults_are_those_of_vllm() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.max_tokens, p.min_tokens, p.seed, p.ignore_eos) == (16, 0, None, False)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.logprobs, p.prompt_logprobs, p.stop, p.stop_token_ids, p.logit_bias) == (None, None, (), (), {})
    assert (p.skip_special_tokens, p.include_stop_str_in_output, p.structured_outputs) == (True, False, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", 1), ("n", 1024), ("temperature", 0), ("temperature", 0.0), ("temperature", 1e30), ("top_p", 1)],
        *[("top_p", 1e-9), ("top_k", -1), ("top_k", 0), ("top_k", 1), ("min_p", 0), ("min_p", 1.0)],
        *[("max_tokens", 1), ("max_tokens", None), ("seed", -1), ("seed", 2**63 - 1), ("seed", None)],
        *[("presence_penalty", -2), ("frequency_penalty", 2.0), ("repetition_penalty", 0.1)],
        *[("logprobs", 0), ("logprobs", 20), ("prompt_logprobs", None), ("ignore_eos", True)],
    ],
)
def test_values_at_the_borders_are_kept(field: str, value: Any) -> None:
    assert getattr(params(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *[("n", value, r"an integer in 1\.\.1024") for value in (0, -1, 1025, 10**30, 1.0, True, None, "2")],
        *[("temperature", value, "a finite number, 0") for value in (-0.1, math.nan, math.inf, -math.inf, "hot", None)],
        *[("temperature", value, "a finite number, 0") for value in (10**400, True, [], 1j)],
        *[("top_p", value, r"a number in \(0, 1\]") for value in (0, -1, 1.0001, math.nan, math.inf)],
        *[("top_k", value, "an integer, 1 or above, or 0 or -1") for value in (-2, 2**31, 1.5, math.nan)],
        *[("min_p", value, r"a number in \[0, 1\]") for value in (-1e-9, 1.1, math.nan)],
        *[("max_tokens", value, "an integer, 1 or above, or None") for value in (0, -5, 2.0, math.inf, math.nan, "9")],
        *[("min_tokens", value, "an integer, 0 or above") for value in (-1, None, 0.0)],
        *[("seed", value, "an integer of 64 bits, or None") for value in (2**63, -(2**63) - 1, 0.5, "a")],
        *[("presence_penalty", value, r"a number in \[-2, 2\]") for value in (-2.1, 3, math.nan, math.inf)],
        *[("frequency_penalty", value, r"a number in \[-2, 2\]") for value in (-2.1, 3, math.nan)],
        *[("repetition_penalty", value, "a finite number above 0") for value in (0, -1, math.nan, math.inf)],
        *[(f, value, r"an integer in 0\.\.20, or None") for f in ("logprobs", "prompt_logprobs") for value in (-1, 21)],
        *[(f, value, "true or false") for f in FLAGS for value in (1, 0, None, "yes")],
        ("stop", 3, "a list of strings"),
        ("stop", {"a": 1}, "a list of strings"),
        ("stop", b"ab", "a list of strings"),
        ("stop_token_ids", 3, "a list of token ids"),
        ("stop_token_ids", "12", "a list of token ids"),
        ("logit_bias", [1, 2], "a mapping of token ids to numbers"),
        *[("structured_outputs", value, "StructuredOutputs or None") for value in ({"regex": "a"}, "a", False)],
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.* must be {expected}"):
        params(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 must not exceed max_tokens=4"),
        ({"stop": [""]}, r"stop\[0\]='' must be a string of 1 to 1024 characters"),
        ({"stop": ["a", 7]}, r"stop\[1\]=7 must be a string"),
        ({"stop": "x" * 1025}, r"stop\[0\]='x+\.\.\.x+' must be a string of 1 to 1024 characters"),
        ({"stop": ["x"] * 100_000}, "stop has 100000 strings, expected at most 128"),
        ({"stop_token_ids": range(100_000)}, "stop_token_ids has 100000 token ids, expected at most 128"),
        ({"stop_token_ids": [4, -1]}, r"stop_token_ids\[1\]=-1 must be a token id, 0 or above"),
        ({"stop_token_ids": [True]}, r"stop_token_ids\[0\]=True must be"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: token id='5' must be an integer, 0 or above"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias\[5\]=100.5 must be a number in \[-100, 100\]"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\]=nan must be"),
    ],
)
def test_what_is_wrong_inside_a_field_is_pointed_at(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**fields)


@pytest.mark.parametrize("field", LISTS)
def test_none_is_an_empty_list(field: str) -> None:
    assert not getattr(params(**{field: None}), field)


def test_lists_are_copied_and_one_string_is_a_list_of_one() -> None:
    stop, ids, bias = ["\n", "User:"], [3, 4], {7: -100}
    p = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    for given_list in (stop, ids, bias):
        given_list.clear()
    assert (p.stop, p.stop_token_ids, p.logit_bias) == (("\n", "User:"), (3, 4), {7: -100})
    assert SamplingParams(stop="\n").stop == ("\n",)


def test_parameters_compare_by_value_and_can_be_keys() -> None:
    form, same_form = StructuredOutputs(json={"type": "object"}), StructuredOutputs(json='{"type": "object"}')
    one = SamplingParams(stop=["a"], logit_bias={1: 2.0}, structured_outputs=form)
    same = SamplingParams(stop="a", logit_bias={1: 2.0}, structured_outputs=same_form)
    assert one == same
    assert len({one, same, SamplingParams()}) == 2


@pytest.mark.parametrize("fields", [{"stop_token_ids": [511, 512]}, {"logit_bias": {512: 1.0}}])
def test_ids_outside_the_vocabulary_are_named(fields: dict[str, Any]) -> None:
    params(**fields).check_vocabulary(513)
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: id 512 is outside the vocabulary of 512"):
        params(**fields).check_vocabulary(512)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)


@_settings
@given(st.dictionaries(st.sampled_from(NUMBERS + INTEGERS + FLAGS + LISTS), ANYTHING, max_size=3))
def test_anything_at_all_is_taken_or_is_a_value_error_that_names_a_field(fields: dict[str, Any]) -> None:
    try:
        p = params(**fields)
    except ValueError as error:
        assert any(str(error).startswith(name) for name in fields)
        return
    assert all(math.isfinite(getattr(p, name)) for name in NUMBERS)
    assert isinstance(p.stop, tuple) and isinstance(p.stop_token_ids, tuple) and isinstance(p.logit_bias, Mapping)


@_settings
@given(st.sampled_from(NUMBERS), st.floats() | st.integers())
def test_numbers_are_kept_exactly_as_given_or_refused(field: str, value: float) -> None:
    try:
        kept = getattr(params(**{field: value}), field)
    except ValueError:
        return
    assert kept == value and not math.isnan(value)


# The engine's limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, "engine.max_num_seqs=0 must be positive"),
        ({"max_num_batched_tokens": -1}, "engine.max_num_batched_tokens=-1 must be positive"),
        ({"num_pages": 0}, "engine.num_pages=0 must be positive"),
        ({"max_model_len": 1}, "engine.max_model_len=1 must be at least 2"),
        ({"gpu_memory_utilization": 0.0}, r"engine.gpu_memory_utilization=0.0 must be in \(0, 1\]"),
        ({"gpu_memory_utilization": float("nan")}, r"engine.gpu_memory_utilization=nan must be in \(0, 1\]"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens=8 must be at least max_num_seqs=9"),
    ],
)
def test_limits_that_cannot_be_met_are_named(fields: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"max_model_len": 100}
    with pytest.raises(ValueError, match=message):
        EngineConfig(**(plain | fields))
