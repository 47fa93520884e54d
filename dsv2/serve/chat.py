"""/v1/chat/completions: conversations, laid out by the model's chat template, and the assistant's answer."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from dsv2.engine.outputs import Delta, Logprob, LogprobsOfToken
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.protocol import Fields, Streaming, number, take_sampling_params
from dsv2.text import Tokenizer, encode_chat

# Keys that a message may have besides role and content, where they hold nothing that the model should see.
_EMPTY_KEYS = {"name", "refusal", "annotations", "audio", "function_call", "tool_calls"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a body asks for."""

    messages: list[dict[str, str]]
    params: SamplingParams
    streaming: Streaming

    @classmethod
    def take(cls, fields: Fields) -> Chat:
        """Raises ValueError for what cannot be answered."""
        messages = take_messages(fields)
        _refuse_tools(fields)
        return cls(
            messages=messages,
            params=take_sampling_params(fields, max_tokens=_max_tokens(fields), logprobs=_logprobs(fields)),
            streaming=Streaming.take(fields),
        )

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """One prompt of token ids. Raises ValueError where the template does."""
        return [encode_chat(tokenizer, self.messages)]


def take_messages(fields: Fields) -> list[dict[str, str]]:
    """Messages of a role and a text, as templates know them; roles are the template's to judge."""
    messages = fields.take("messages", list)
    if not messages:
        raise ValueError("messages must be a list of at least one message")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(place: int, message: Any) -> dict[str, str]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise ValueError(f"{where}={reprlib.repr(message)} must be an object with role and content")
    for key in message.keys() - {"role", "content"}:
        if key not in _EMPTY_KEYS or message[key]:
            raise ValueError(f"{where} has {key}={reprlib.repr(message[key])}, expected role and content alone")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where} has role={reprlib.repr(role)}, expected a string")
    # OpenAI's newer name for what every template calls the system.
    return {"role": "system" if role == "developer" else role, "content": _content(where, message.get("content"))}


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} has content={reprlib.repr(content)}, expected a string or a list of text parts")
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise ValueError(f'{where} has the part {reprlib.repr(part)}, expected {{"type": "text", "text": ...}}')
    return "\n".join(part["text"] for part in content)


def _max_tokens(fields: Fields) -> int | None:
    old, new = fields.take("max_tokens", int), fields.take("max_completion_tokens", int)
    if None not in (old, new) and old != new:
        raise ValueError(f"max_tokens={old} must be max_completion_tokens={new} where both are given")
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    is_wanted = fields.take("logprobs", bool, False)
    num_top = fields.take("top_logprobs", int)
    if num_top and not is_wanted:
        raise ValueError(f"top_logprobs={num_top} must only be given where logprobs is true")
    return num_top or 0 if is_wanted else None


def _refuse_tools(fields: Fields) -> None:
    choice = fields.take("tool_choice", (str, dict), "none")
    if fields.take("tools", list) or choice not in ("none", "auto"):
        raise ValueError("tools must be left out: the model's chat template does not take any")


class ChatWriter:
    """Writes choices: messages, and what a stream adds to them."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, request: Chat, tokenizer: Tokenizer) -> None:
        self._has_logprobs, self._num_top = request.params.logprobs is not None, request.params.logprobs or 0
        self._tokenizer = tokenizer

    def whole(self, choice_idx: int, delta: Delta) -> dict[str, Any]:
        """A choice of which `delta` is all that was said."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._choice(choice_idx, delta, {"message": message})

    def first(self, choice_idx: int, delta: Delta) -> dict[str, Any]:
        """What a choice begins with in a stream."""
        return self._choice(choice_idx, delta, {"delta": {"role": "assistant", "content": delta.text}})

    def more(self, choice_idx: int, delta: Delta) -> dict[str, Any] | None:
        """What a stream adds to a choice; None: nothing."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._choice(choice_idx, delta, {"delta": {"content": delta.text} if delta.text else {}})

    def _choice(self, choice_idx: int, delta: Delta, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": self._logprobs(delta), "refusal": None} if self._has_logprobs else None
        ended = {"logprobs": logprobs, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        return {"index": choice_idx} | said | ended

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        pairs = zip(delta.token_ids, delta.logprobs or (), strict=True)
        return [self._scored(token_id, logprobs) for token_id, logprobs in pairs]

    def _scored(self, token_id: int, logprobs: LogprobsOfToken) -> dict[str, Any]:
        top = sorted((item for item in logprobs.items() if item[1].rank <= self._num_top), key=lambda i: i[1].rank)
        return self._token(token_id, logprobs[token_id]) | {"top_logprobs": [self._token(*each) for each in top]}

    def _token(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": logprob.decoded_token,
            "logprob": number(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }
