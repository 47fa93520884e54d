"""`SamplingParams`: what a request asks of its output, under vLLM's names.

Checks ranges, so that whatever the rest of the engine meets is sane. Draws no token (`kernels.sample` does), finds no
stop string in a text, and needs no torch.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from dsv2.config.schema import require
from dsv2.engine.structured import StructuredOutputs

MAX_SEQUENCES = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 128
"""Stop strings of a request, and stop token ids."""
MAX_STOP_CHARS = 1024

_ABOVE_0 = math.ulp(0.0)
_FINITE = sys.float_info.max

# Lowest and highest value, and the words for them.
_REALS = {
    "temperature": (0, _FINITE, "a finite number, 0 (greedy) or above"),
    "top_p": (_ABOVE_0, 1, "a number in (0, 1]"),
    "min_p": (0, 1, "a number in [0, 1]"),
    "presence_penalty": (-2, 2, "a number in [-2, 2]"),
    "frequency_penalty": (-2, 2, "a number in [-2, 2]"),
    "repetition_penalty": (_ABOVE_0, _FINITE, "a finite number above 0"),
}
_INTEGERS = {
    "n": (1, MAX_SEQUENCES, f"an integer in 1..{MAX_SEQUENCES}"),
    "top_k": (-1, 2**31 - 1, "an integer, 1 or above, or 0 or -1 for no limit"),
    "min_tokens": (0, math.inf, "an integer, 0 or above"),
}
_OPTIONAL_INTEGERS = {
    "max_tokens": (1, math.inf, "an integer, 1 or above, or None for no limit"),
    "seed": (-(2**63), 2**63 - 1, "an integer of 64 bits, or None"),
    "logprobs": (0, MAX_LOGPROBS, f"an integer in 0..{MAX_LOGPROBS}, or None"),
    "prompt_logprobs": (0, MAX_LOGPROBS, f"an integer in 0..{MAX_LOGPROBS}, or None"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are drawn, when they end and what comes with them.

    Raises ValueError that names the field, its value and what was expected.
    """

    n: int = 1
    """Sequences to generate."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    max_tokens: int | None = 16
    """Tokens to generate at most; None: as many as the context has room for."""
    min_tokens: int = 0
    """Tokens before which nothing but `max_tokens` ends a sequence."""
    seed: int | None = None
    stop: Sequence[str] = ()
    """Strings that end a sequence: one, several, or None. Kept as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Ids that end a sequence besides those of the model. Kept as a tuple."""
    ignore_eos: bool = False
    """The model's own end of sequence does not end this one; `stop_token_ids` still do."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    """Log-probabilities of so many candidates beside each generated token's own; None: not even that."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """What is added to the logits of token ids, -100 to 100."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None
    """The form that every output has, if it ends before `max_tokens`."""

    def __post_init__(self) -> None:
        for name, limits in _REALS.items():
            _check(name, getattr(self, name), Real, *limits)
        for name, limits in _INTEGERS.items():
            _check(name, getattr(self, name), Integral, *limits)
        for name, limits in _OPTIONAL_INTEGERS.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), Integral, *limits)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name}={reprlib.repr(value)} must be true or false")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}",
        )
        require(
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs),
            f"structured_outputs={reprlib.repr(self.structured_outputs)} must be StructuredOutputs or None",
        )
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError for a token id that the model does not have."""
        for name in ("stop_token_ids", "logit_bias"):
            for token_id in getattr(self, name):
                require(token_id < vocab_size, f"{name}: id {token_id} is outside the vocabulary of {vocab_size}")


def _check(name: str, value: Any, kind: type, low: float, high: float, expected: str) -> None:
    # NaN fails every comparison, and integers too large for a float are compared exactly.
    fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    require(fits, f"{name}={reprlib.repr(value)} must be {expected}")


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _at_most(MAX_STOPS, "stop", value, "strings")
    for i, text in enumerate(strings):
        require(
            isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS,
            f"stop[{i}]={reprlib.repr(text)} must be a string of 1 to {MAX_STOP_CHARS} characters",
        )
    return strings


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    ids = _at_most(MAX_STOPS, "stop_token_ids", value, "token ids")
    for i, token_id in enumerate(ids):
        _check(f"stop_token_ids[{i}]", token_id, Integral, 0, math.inf, "a token id, 0 or above")
    return ids


def _logit_bias(value: Any) -> dict[int, float]:
    value = {} if value is None else value
    require(isinstance(value, Mapping), f"logit_bias={reprlib.repr(value)} must be a mapping of token ids to numbers")
    for token_id, bias in value.items():
        _check("logit_bias: token id", token_id, Integral, 0, math.inf, "an integer, 0 or above")
        _check(f"logit_bias[{token_id}]", bias, Real, -100, 100, "a number in [-100, 100]")
    return dict(value)


def _at_most(limit: int, name: str, value: Any, things: str) -> tuple[Any, ...]:
    value = () if value is None else value
    is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
    require(is_list, f"{name}={reprlib.repr(value)} must be a list of {things}")
    require(len(value) <= limit, f"{name} has {len(value)} {things}, expected at most {limit}")
    return tuple(value)
