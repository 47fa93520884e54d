"""What all endpoints share: bodies read strictly, errors in OpenAI's form, sampling parameters, usage.

A field that nobody knows is refused, since ignoring it would answer another question than the one asked. Knows
neither HTTP nor the engine's thread.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2.config.schema import unknown_key_error
from dsv2.engine.outputs import Delta, Logprob
from dsv2.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from dsv2.engine.structured import StructuredOutputs
    from dsv2.serve.loop import Call

# Fields of OpenAI's that change no answer.
_WITHOUT_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store")
_SAMPLING = (
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_p",
)
# What JSON, which has no infinities, gets in place of minus infinity; as vLLM.
_LOWEST_LOGPROB = -9999.0
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # which json.dumps would make for every event


class ApiError(Exception):
    """An answer with an error status, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(error: ValueError | RecursionError) -> ApiError:
    """400 with the message of an error, and the field that it begins with."""
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply")
    named = re.match(r"([a-z_]+)(?=[=:\[]| (?:has|is|must) )", str(error))
    return ApiError(400, str(error), param=named[1] if named else None)


def to_json(value: Any) -> bytes:
    # A lone surrogate, such as of a model's name that is quoted back, becomes the escape that JSON has for it.
    return _encoder.encode(value).encode("utf-8", "backslashreplace")


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % to_json(value)


class Fields:
    """The fields of a JSON body, to be taken one by one. Null counts as absent."""

    def __init__(self, body: bytes) -> None:
        """Raises ValueError for what is not an object in strict JSON and UTF-8, RecursionError for a deep one."""
        self.num_bytes = len(body)
        try:
            value = json.loads(body.decode(), parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            raise ValueError(f"the body is not UTF-8: {error}") from None
        except ValueError as error:
            raise ValueError(f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"the body is a JSON {type(value).__name__}, expected an object")
        self._rest: dict[str, Any] = {name: item for name, item in value.items() if item is not None}
        self._known: list[str] = []

    def take(self, name: str, kind: type | tuple[type, ...] = object, default: Any = None) -> Any:
        """The value of a field that must be of `kind`; an integer is a number, but true is none."""
        self._known.append(name)
        value = self._rest.pop(name, default)
        is_bool_for_number = isinstance(value, bool) and kind is int
        if value is not default and (not isinstance(value, kind) or is_bool_for_number):
            names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(names[each] for each in kinds)
            raise ValueError(f"{name}={reprlib.repr(value)} must be {expected}")
        return value

    def finish(self) -> None:
        """ValueError for fields that were not taken and would have an effect."""
        for name in self._rest:
            if name not in (*_WITHOUT_EFFECT, "user"):
                raise unknown_key_error(name, self._known, "the request")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


# Parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Streaming:
    is_on: bool
    includes_usage: bool

    @classmethod
    def take(cls, fields: Fields) -> Streaming:
        is_on = fields.take("stream", bool, False)
        options = fields.take("stream_options", dict)
        if options is not None and not is_on:
            raise ValueError("stream_options must only be given where stream is true")
        for name, value in (options or {}).items():
            if name != "include_usage" or not isinstance(value, bool):
                raise ValueError(f"stream_options has {name}={reprlib.repr(value)}, expected include_usage, a bool")
        return cls(is_on, (options or {}).get("include_usage", False))


def take_sampling_params(
    fields: Fields, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """What both endpoints name alike, beside what they don't. Raises ValueError as `SamplingParams` does."""
    given = {name: value for name in _SAMPLING if (value := fields.take(name)) is not None}
    if bias := fields.take("logit_bias", dict):
        given["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    if (outputs := take_structured_outputs(fields)) is not None:
        given["structured_outputs"] = outputs
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given)


def take_structured_outputs(fields: Fields) -> StructuredOutputs | None:
    """OpenAI's `response_format` or vLLM's `structured_outputs`: {"json" | "regex" | "choice" | "grammar": ...}."""
    given = fields.take("structured_outputs", dict)
    response_format = fields.take("response_format", dict)
    if response_format is not None:
        if given is not None:
            raise ValueError("response_format must not be given beside structured_outputs")
        given = _format_as_structure(response_format)
    if given is None:
        return None
    from dsv2.engine.structured import StructuredOutputs

    known = ("json", "regex", "choice", "grammar")
    for name in given:
        if name not in known:
            raise unknown_key_error(name, known, "structured_outputs")
    return StructuredOutputs(**given)


def _format_as_structure(response_format: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": {"type": "object"}}
    if kind != "json_schema":
        raise ValueError(f"response_format has type={reprlib.repr(kind)}, expected text, json_object or json_schema")
    named = response_format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise ValueError('response_format must hold {"json_schema": {"schema": {...}}}')
    return {"json": schema}


def _token_id(key: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", key):
        raise ValueError(f"logit_bias: token id {reprlib.repr(key)} must be an integer, 0 or above")
    return int(key)


# Answers ----------------------------------------------------------------------------------------------------------


class Usage:
    """How many tokens a call has taken, as its deltas pass."""

    def __init__(self, call: Call, *, drops_output: bool = False) -> None:
        self._num_prompt_tokens = sum(map(len, call.prompts))
        self._num_output_tokens = 0
        self._num_cached_tokens: dict[str, int] = {}  # by request: n sequences share one prompt
        self._drops_output = drops_output

    def add(self, delta: Delta) -> None:
        self._num_output_tokens += 0 if self._drops_output else len(delta.token_ids)
        if delta.index == 0:
            self._num_cached_tokens[delta.request_id] = delta.num_cached_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }


def joined(deltas: Iterable[Delta]) -> Delta:
    """One delta that says what several of a sequence, at least one, said one after the other."""
    parts = list(deltas)
    first, last = parts[0], parts[-1]
    return Delta(
        request_id=first.request_id,
        index=first.index,
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=None if first.logprobs is None else [each for part in parts for each in part.logprobs or ()],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
        cumulative_logprob=last.cumulative_logprob,
    )


def number(logprob: Logprob) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob.logprob, _LOWEST_LOGPROB)
