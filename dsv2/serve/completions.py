"""/v1/completions: prompts that are text or token ids, continued, and scored in OpenAI's legacy form.

With `echo` and `logprobs` the prompt's tokens are scored too, which is what lm-eval's `local-completions` reads.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2.engine.outputs import Delta, LogprobsOfToken
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.protocol import Fields, Streaming, number, take_sampling_params
from dsv2.text import StreamDecoder, Tokenizer

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a body asks for. `params.max_tokens` is 1 where `drops_output`: only the prompt is wanted."""

    prompts: list[Prompt]
    params: SamplingParams
    streaming: Streaming
    echo: bool
    drops_output: bool
    add_special_tokens: bool

    @classmethod
    def take(cls, fields: Fields) -> Completion:
        """Raises ValueError for what cannot be answered."""
        prompts = _prompts(fields.take("prompt"))
        echo = fields.take("echo", bool, False)
        logprobs = fields.take("logprobs", int)
        max_tokens = fields.take("max_tokens", int, 16)
        streaming = Streaming.take(fields)
        drops_output = max_tokens == 0 and echo
        params = take_sampling_params(
            fields,
            max_tokens=1 if drops_output else max_tokens,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
        )
        _refuse(fields, params, is_scored_stream=streaming.is_on and echo and logprobs is not None)
        return cls(
            prompts=prompts,
            params=params,
            streaming=streaming,
            echo=echo,
            drops_output=drops_output,
            add_special_tokens=fields.take("add_special_tokens", bool, True),
        )

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The prompts as token ids; text comes after a BOS. ValueError for text that is no Unicode."""
        add_bos = self.add_special_tokens
        return [tokenizer.encode(p, add_bos=add_bos) if isinstance(p, str) else p for p in self.prompts]


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str) or (_is_list_of(value, int) and value):
        return [value]
    if _is_list_of(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_list_of(each, int) and each for each in value):
        return value
    raise ValueError(f"prompt={reprlib.repr(value)} must be a string, token ids, or a list of either, not empty")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _refuse(fields: Fields, params: SamplingParams, is_scored_stream: bool) -> None:
    best_of = fields.take("best_of", int, params.n)
    if best_of != params.n:
        raise ValueError(f"best_of={best_of} must be n={params.n}: choosing among more is not supported")
    if fields.take("suffix", str, ""):
        raise ValueError("suffix must be empty: filling in the middle is not supported")
    if is_scored_stream and params.n > 1:
        # The prompt's scores come with sequence 0, but others may have something to say before.
        raise ValueError(f"n={params.n} must be 1 where a prompt is echoed with logprobs in a stream")


class CompletionWriter:
    """Writes choices. Keeps where each choice's text stands, so it takes a choice's deltas in order."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, request: Completion, prompt_ids: Sequence[list[int]], tokenizer: Tokenizer) -> None:
        self._request, self._prompt_ids, self._tokenizer = request, prompt_ids, tokenizer
        self._positions: dict[int, _Position] = {}

    def first(self, choice_idx: int, delta: Delta) -> dict[str, Any]:
        """What a choice begins with, echo included: all of it where `delta` is all that was said."""
        request = self._request
        self._positions[choice_idx] = _Position(self._tokenizer, request.params.skip_special_tokens)
        scored: list[tuple[int, LogprobsOfToken | None]] = []
        text = ""
        if request.echo:
            prompt_idx = choice_idx // request.params.n
            text = self._echo(prompt_idx)
            scored += zip(self._prompt_ids[prompt_idx], delta.prompt_logprobs or (), strict=False)
        if not request.drops_output:
            text += delta.text
            scored += zip(delta.token_ids, delta.logprobs or (), strict=False)
        return self._choice(choice_idx, delta, text, scored)

    def more(self, choice_idx: int, delta: Delta) -> dict[str, Any] | None:
        """What a stream adds to a choice; None: nothing."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._choice(choice_idx, delta, delta.text, zip(delta.token_ids, delta.logprobs or (), strict=False))

    whole = first

    def _echo(self, prompt_idx: int) -> str:
        prompt = self._request.prompts[prompt_idx]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=self._request.params.skip_special_tokens)

    def _choice(
        self, choice_idx: int, delta: Delta, text: str, scored: Iterable[tuple[int, LogprobsOfToken | None]]
    ) -> dict[str, Any]:
        has_logprobs = self._request.params.logprobs is not None
        return {
            "index": choice_idx,
            "text": text,
            "logprobs": self._logprobs(choice_idx, scored) if has_logprobs else None,
            "finish_reason": "length" if self._request.drops_output else delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, choice_idx: int, scored: Iterable[tuple[int, LogprobsOfToken | None]]) -> dict[str, Any]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprobs in scored:
            out["text_offset"].append(self._positions[choice_idx].pass_by(token_id))
            if logprobs is None:  # nothing comes before a prompt's first token
                out["tokens"].append(self._tokenizer.decode([token_id], skip_special_tokens=False))
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
            else:
                out["tokens"].append(logprobs[token_id].decoded_token)
                out["token_logprobs"].append(number(logprobs[token_id]))
                out["top_logprobs"].append(_by_text(logprobs))
        return out


def _by_text(logprobs: LogprobsOfToken) -> dict[str, float]:
    """Of tokens that read alike, such as parts of characters, the most probable."""
    best: dict[str, float] = {}
    for each in logprobs.values():
        best[each.decoded_token] = max(number(each), best.get(each.decoded_token, float("-inf")))
    return best


class _Position:
    """How many characters of a text its tokens have made so far."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self._num_chars = 0

    def pass_by(self, token_id: int) -> int:
        """Where the token's text begins."""
        start = self._num_chars
        self._num_chars += len(self._decoder.push(token_id))
        return start
