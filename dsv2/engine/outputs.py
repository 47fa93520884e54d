"""What an engine says about a request: step by step as `Delta`, and as a whole as `RequestOutput`. vLLM's names.

Data only, and no torch: `core` makes deltas, `llm` adds them up, a server sends them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsv2.engine.sequence import FinishReason


class Logprob(NamedTuple):
    logprob: float
    """Natural logarithm of the token's probability under the model itself."""
    rank: int
    """1: the most probable token."""
    decoded_token: str
    """The text of the token alone, control tokens spelled out; U+FFFD where its bytes are part of a character, and ""
    without a tokenizer."""


LogprobsOfToken = dict[int, Logprob]
"""By token id: the token itself, then the candidates that were asked for, the most probable first."""


@dataclass(slots=True, kw_only=True)
class Delta:
    """What one step added to one sequence. Thousands a second are made, and a frozen one takes three times as long."""

    request_id: str
    index: int
    """Which of the request's n sequences."""
    text: str
    """New text that is safe to show: what may turn out to be a stop string is held back. Empty without a tokenizer."""
    token_ids: list[int]
    """New tokens. Empty only where the sequence was aborted."""
    logprobs: list[LogprobsOfToken] | None
    """One a new token; None where `SamplingParams.logprobs` is."""
    finish_reason: FinishReason | None
    """Set in a sequence's last delta."""
    stop_reason: str | int | None
    """The stop string or the id of `stop_token_ids` that ended the sequence; None for the model's own end."""
    num_cached_tokens: int
    """Tokens of the prompt that were found in the prefix cache."""
    prompt_logprobs: list[LogprobsOfToken | None] | None
    """In the first delta of sequence 0, one a prompt token, None for the first; None where
    `SamplingParams.prompt_logprobs` is, and in all other deltas."""
    cumulative_logprob: float = 0.0
    """Sum of the log-probabilities of all the sequence's tokens so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the n answers to a prompt."""

    index: int
    text: str
    """Without the stop string or stop token, unless asked for. Empty without a tokenizer."""
    token_ids: list[int]
    """All that was generated, the tokens of a stop string and the stop token included."""
    cumulative_logprob: float
    """Sum of the tokens' log-probabilities under the model itself."""
    logprobs: list[LogprobsOfToken] | None
    """One a token; None where `SamplingParams.logprobs` is."""
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or the id of `stop_token_ids` that ended the answer; None for the model's own end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsOfToken | None] | None
    """One a prompt token, None for the first; None where `SamplingParams.prompt_logprobs` is."""
    outputs: list[CompletionOutput]
    """By index."""
    num_cached_tokens: int
    """Tokens of the prompt that its first answer found in the prefix cache."""
