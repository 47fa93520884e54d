"""Tools of a chat request: functions that may be called, calls in its messages, and calls in the answer.

Forms are OpenAI's. How a template is told of calls and how a model writes them is for `dsv2.text.tools` to know.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from dsv2.engine.outputs import Delta
from dsv2.engine.sampling import SamplingParams
from dsv2.engine.structured import StructuredOutputs
from dsv2.engine.tool_calls import ToolCalls
from dsv2.serve.protocol import Fields
from dsv2.text.tools import NAME, CallParser, CallPiece, Markup, Said, tool_style

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 262_144
"""Of all tools, as JSON."""

_CHOICES = 'none, auto, required or {"type": "function", "function": {"name": ...}}'


# Functions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What an answer may call, or must."""

    functions: list[dict[str, Any]]
    """As the template is told of them; none where nothing may be called."""
    markup: Markup | None
    """Which calls are looked for in an answer; None: none are."""
    form: StructuredOutputs | None
    """What the answer must be; None: calls or text, as the model likes."""
    is_parallel: bool
    """An answer may hold more than one call."""

    @classmethod
    def take(cls, fields: Fields, template: str) -> Tools:
        """`tools`, `tool_choice` and `parallel_tool_calls`. Raises ValueError for what `template` cannot be asked."""
        tools = fields.take("tools", list, [])
        choice = fields.take("tool_choice", (str, dict), "auto" if tools else "none")
        is_parallel = fields.take("parallel_tool_calls", bool, True)
        schemas = _schemas(tools)
        chosen = _chosen(choice, schemas)
        if not tools:
            return cls(functions=[], markup=None, form=None, is_parallel=is_parallel)
        try:
            markup = tool_style(template).markup
        except ValueError as error:
            raise ValueError(f"tools must be left out: {error}") from None
        if choice == "none":
            return cls(functions=[], markup=None, form=None, is_parallel=is_parallel)
        return cls(
            functions=[_told(tool) for tool in tools],
            markup=markup,
            form=_form(markup, chosen, is_several=is_parallel and choice == "required"),
            is_parallel=is_parallel,
        )

    def applied_to(self, params: SamplingParams) -> SamplingParams:
        """Raises ValueError where the answer has another form already."""
        if self.markup is None:
            return params
        if params.structured_outputs is not None:
            raise ValueError("tools must be left out, or tool_choice none, where the answer's form is given")
        # A tokenizer may have marked markup as special.
        return replace(params, structured_outputs=self.form, skip_special_tokens=False)


def _schemas(tools: list[Any]) -> dict[str, str]:
    """The schemas of functions' arguments as JSON, by name."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} tools, expected at most {MAX_TOOLS}")
    num_chars = len(json.dumps(tools, ensure_ascii=False))
    if num_chars > MAX_TOOLS_CHARS:
        raise ValueError(f"tools has {num_chars} characters as JSON, expected at most {MAX_TOOLS_CHARS}")
    schemas: dict[str, str] = {}
    for place, tool in enumerate(tools):
        name, schema = _function(f"tools[{place}]", tool)
        if name in schemas:
            raise ValueError(f"tools[{place}] has the name {name!r}, which another tool has")
        schemas[name] = schema
    return schemas


def _function(where: str, tool: Any) -> tuple[str, str]:
    """Its name and the schema of its arguments."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ValueError(f'{where}={reprlib.repr(tool)} must be {{"type": "function", "function": {{...}}}}')
    name = _checked_name(f"{where}.function", function.get("name"))
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{where}.function has description={reprlib.repr(function['description'])}, expected a string")
    given = function.get("parameters")
    if given is None:
        given = {"properties": {}, "additionalProperties": False}
    if not isinstance(given, dict) or given.get("type", "object") != "object":
        raise ValueError(f"{where}.function has parameters={reprlib.repr(given)}, expected a JSON schema of an object")
    try:
        schema = StructuredOutputs(json={"type": "object"} | given).json
    except ValueError as error:
        raise ValueError(f"{where}.function.parameters: {error}") from None
    return name, str(schema)


def _checked_name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(f"{where} has name={reprlib.repr(name)}, expected 1 to 64 of a-z, A-Z, 0-9, _ and -")
    return name


def _told(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Without `strict`, which says how to sample and nothing to the model, and without what is null."""
    function = {key: value for key, value in tool["function"].items() if key != "strict" and value is not None}
    return {"type": "function", "function": function}


def _chosen(choice: str | dict[str, Any], schemas: Mapping[str, str]) -> dict[str, str]:
    """Functions of which one must be called; empty: none need be."""
    if choice in ("none", "auto"):
        return {}
    if not schemas:
        raise ValueError(f"tool_choice={reprlib.repr(choice)} must be left out where no tools are given")
    if choice == "required":
        return dict(schemas)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ValueError(f"tool_choice={reprlib.repr(choice)} must be {_CHOICES}")
    name = function.get("name")
    if not isinstance(name, str) or name not in schemas:
        raise ValueError(f"tool_choice: name={reprlib.repr(name)} must be a tool's, as {next(iter(schemas))!r}")
    return {name: schemas[name]}


def _form(markup: Markup, chosen: Mapping[str, str], *, is_several: bool) -> StructuredOutputs | None:
    if not chosen:
        return None
    try:
        return StructuredOutputs(tool_calls=ToolCalls(markup, tuple(chosen.items()), is_several))
    except ValueError as error:
        raise ValueError(f"tools: parameters of all functions together: {error}") from None


# Messages ----------------------------------------------------------------------------------------------------------


def call_keys(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has of calls: an assistant's `tool_calls`, a tool's `tool_call_id`. ValueError for other forms."""
    calls, call_id = message.get("tool_calls"), message.get("tool_call_id")
    if message.get("role") == "assistant" and calls:
        if not isinstance(calls, list):
            raise ValueError(f"{where} has tool_calls={reprlib.repr(calls)}, expected a list")
        return {"tool_calls": [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]}
    if message.get("role") != "tool":
        return {}
    if not isinstance(call_id, str):
        raise ValueError(f"{where} has tool_call_id={reprlib.repr(call_id)}, expected a string")
    return {"tool_call_id": call_id}


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(call.get("id"), str):
        expected = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise ValueError(f"{where}={reprlib.repr(call)} must be {expected}")
    name, arguments = _checked_name(f"{where}.function", function.get("name")), function.get("arguments")
    try:
        is_object = isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError(f"{where} has arguments={reprlib.repr(arguments)}, expected a JSON object as a string")
    return {"id": call["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def told(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Messages as `template` is told of them. ValueError where it takes no calls, or a result has no call before it."""
    ids: set[str] = set()
    places = [place for place, message in enumerate(messages) if "tool_calls" in message or "tool_call_id" in message]
    for place in places:
        ids.update(call["id"] for call in messages[place].get("tool_calls", ()))
        call_id = messages[place].get("tool_call_id")
        if call_id is not None and call_id not in ids:
            raise ValueError(f"messages[{place}] has tool_call_id={reprlib.repr(call_id)}, which no call before it has")
    try:
        return tool_style(template).told(messages) if places else messages
    except ValueError as error:
        raise ValueError(f"messages[{places[0]}] has tool calls or a result of one: {error}") from None


# Answers -----------------------------------------------------------------------------------------------------------


class AnswerReader:
    """What one choice says, delta by delta: content, and calls as OpenAI has them."""

    def __init__(self, tools: Tools) -> None:
        self._parser = None if tools.markup is None else CallParser(tools.markup)
        self._is_parallel = tools.is_parallel

    def read(self, delta: Delta) -> Said:
        """Calls after the first are left out where only one was asked for."""
        if self._parser is None:
            return Said(delta.text)
        said = self._parser.push(delta.text)
        if delta.finish_reason:
            said.content += self._parser.flush().content
        if not self._is_parallel:
            said.calls = [call for call in said.calls if call.index == 0]
        return said

    def finish_reason(self, delta: Delta) -> str | None:
        is_called = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if is_called and delta.finish_reason == "stop" else delta.finish_reason


def call_of(piece: CallPiece) -> dict[str, Any]:
    """What a message, or a stream's delta, has of a call. The first piece of each call gives it its id."""
    if piece.name is None:
        return {"function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": function}
