"""/v1/chat/completions: conversations, laid out by the model's chat template, and the assistant's answer."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from dsv2.engine.outputs import Delta, Logprob, LogprobsOfToken
from dsv2.engine.sampling import SamplingParams
from dsv2.serve.protocol import Fields, Streaming, number, take_sampling_params
from dsv2.serve.tools import AnswerReader, Tools, call_keys, call_of, told
from dsv2.text import Tokenizer, encode_chat
from dsv2.text.tools import Said

# Keys that a message may have besides role and content, where they hold nothing that the model should see.
_EMPTY_KEYS = {"name", "refusal", "annotations", "audio", "function_call", "tool_calls"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a body asks for."""

    messages: list[dict[str, Any]]
    tools: Tools
    params: SamplingParams
    streaming: Streaming

    @classmethod
    def take(cls, fields: Fields, template: str) -> Chat:
        """Raises ValueError for what cannot be answered."""
        messages, tools = take_messages(fields, template), Tools.take(fields, template)
        params = take_sampling_params(fields, max_tokens=_max_tokens(fields), logprobs=_logprobs(fields))
        return cls(
            messages=messages,
            tools=tools,
            params=tools.applied_to(params),
            streaming=Streaming.take(fields),
        )

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """One prompt of token ids. Raises ValueError where the template does."""
        return [encode_chat(tokenizer, self.messages, tools=self.tools.functions)]


def take_messages(fields: Fields, template: str) -> list[dict[str, Any]]:
    """Messages as `template` knows them, of a role, a text and perhaps tool calls; roles are for it to judge."""
    messages = fields.take("messages", list)
    if not messages:
        raise ValueError("messages must be a list of at least one message")
    return told([_message(i, message) for i, message in enumerate(messages)], template)


def _message(place: int, message: Any) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise ValueError(f"{where}={reprlib.repr(message)} must be an object with role and content")
    calls = call_keys(where, message)
    for key in message.keys() - {"role", "content"} - calls.keys():
        is_told = key == "name" and "tool_call_id" in calls  # the call that has the id tells the name
        if (key not in _EMPTY_KEYS or message[key]) and not is_told:
            raise ValueError(f"{where} has {key}={reprlib.repr(message[key])}, expected role and content alone")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where} has role={reprlib.repr(role)}, expected a string")
    content = message.get("content")
    text = "" if content is None and "tool_calls" in calls else _content(where, content)
    # OpenAI's newer name for what every template calls the system.
    return {"role": "system" if role == "developer" else role, "content": text} | calls


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


class ChatWriter:
    """Writes choices: messages, and what a stream adds to them. Takes a choice's deltas in order."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, request: Chat, tokenizer: Tokenizer) -> None:
        self._has_logprobs, self._num_top = request.params.logprobs is not None, request.params.logprobs or 0
        self._tokenizer, self._tools = tokenizer, request.tools
        self._readers: dict[int, AnswerReader] = {}

    def whole(self, choice_idx: int, delta: Delta) -> dict[str, Any]:
        """A choice of which `delta` is all that was said."""
        reader = self._readers[choice_idx] = AnswerReader(self._tools)
        said = reader.read(delta)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.calls:
            message |= {"content": said.content or None, "tool_calls": [call_of(call) for call in said.calls]}
        return self._choice(choice_idx, delta, {"message": message})

    def first(self, choice_idx: int, delta: Delta) -> dict[str, Any]:
        """What a choice begins with in a stream."""
        reader = self._readers[choice_idx] = AnswerReader(self._tools)
        said = {"role": "assistant", "content": None if self._tools.markup else ""} | _added(reader.read(delta))
        return self._choice(choice_idx, delta, {"delta": said})

    def more(self, choice_idx: int, delta: Delta) -> dict[str, Any] | None:
        """What a stream adds to a choice; None: nothing."""
        said = _added(self._readers[choice_idx].read(delta))
        if not (said or delta.logprobs or delta.finish_reason):
            return None
        return self._choice(choice_idx, delta, {"delta": said})

    def _choice(self, choice_idx: int, delta: Delta, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": self._logprobs(delta), "refusal": None} if self._has_logprobs else None
        finish_reason = self._readers[choice_idx].finish_reason(delta)
        ended = {"logprobs": logprobs, "finish_reason": finish_reason, "stop_reason": delta.stop_reason}
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


def _added(said: Said) -> dict[str, Any]:
    """What a stream's delta says."""
    calls = [{"index": call.index} | call_of(call) for call in said.calls]
    return ({"content": said.content} if said.content else {}) | ({"tool_calls": calls} if calls else {})
