"""Tool calls as models write them: DeepSeek's and Hermes' markup, found in text that arrives bit by bit.
Paper: none; the model card of DeepSeek-V2.5, and the prompt format of Hermes 2 Pro, which Qwen's templates share.
Does not: check arguments against a schema, run a tool, or know requests, token ids and HTTP.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product, starmap
from typing import Any

from dsv2.text.chat import render, takes_tools

NAME = "[a-zA-Z0-9_-]{1,64}"
"""What a function may be called."""

_SPACE = r"[ \t\r\n]{0,8}"


@dataclass(frozen=True)
class Markup:
    """How calls are spelled. Where it has white space, the model may write more, other or none."""

    name: str
    begin: str
    """Before the first call of several."""
    call: str
    """Before a function's name."""
    after_name: str
    """Between the name and the arguments, a JSON object."""
    call_end: str
    separator: str
    """Between two calls; white space."""
    end: str
    """After the last call."""

    @cached_property
    def first(self) -> re.Pattern[str]:
        """Finds the first call up to its arguments, as `whole` with the `name`, or at the end what may become one."""
        return _growing(self._head(self.begin))

    @cached_property
    def close(self) -> re.Pattern[str]:
        """Matches what follows the arguments of a call, as `first` does."""
        return _growing([_SPACE, *_atoms(self.call_end)])

    @cached_property
    def next(self) -> re.Pattern[str]:
        """Matches the next call up to its arguments, as `first` does, or the end of calls as `end`, after a call."""
        ended = [_SPACE, *_atoms(self.end)] if self.end else []
        return _growing([_SPACE, *self._head("")], ended)

    def _head(self, begin: str) -> list[str]:
        # White space between the two markers of a first call is a separator that came early.
        between = [_SPACE] if begin else []
        name = [f"(?P<name>{NAME})"]
        return [*_atoms(begin), *between, *_atoms(self.call), *name, *_atoms(self.after_name), r"(?=\{)"]


def _atoms(spelled: str) -> list[str]:
    """Patterns of a spelling, one a character or a run of white space."""
    return [_SPACE if part.isspace() else re.escape(part) for part in re.findall(r"\s+|\S", spelled)]


def _growing(whole: Sequence[str], end: Sequence[str] = ()) -> re.Pattern[str]:
    """A pattern of all atoms in a row, as `whole`; of others as `end`; or of the first few of either, to the end."""
    options = [f"(?P<whole>{''.join(whole)})", rf"{_first_few(whole)}\Z"]
    if end:
        options += [f"(?P<end>{''.join(end)})", rf"{_first_few(end)}\Z"]
    return re.compile("|".join(options))


def _first_few(atoms: Sequence[str]) -> str:
    rest = ""
    for atom in reversed(atoms[1:]):
        rest = f"(?:{atom.replace('?P<name>', '?:')}{rest})?"
    return atoms[0] + rest


DEEPSEEK = Markup(
    name="DeepSeek's",
    begin="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    after_name="\n```json\n",
    call_end="\n```<｜tool▁call▁end｜>",
    separator="\n",
    end="<｜tool▁calls▁end｜>",
)
HERMES = Markup(
    name="Hermes'",
    begin="",
    call='<tool_call>\n{"name": "',
    after_name='", "arguments": ',
    call_end="}\n</tool_call>",
    separator="\n",
    end="",
)
MARKUPS = (DEEPSEEK, HERMES)


# What a model says -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CallPiece:
    """What is new of a call."""

    index: int
    """Which call, from 0."""
    name: str | None
    """In a call's first piece alone."""
    arguments: str
    """The next characters of a JSON object. A model may end, or go wrong, inside it: whoever runs tools checks."""


@dataclass(slots=True)
class Said:
    """What a text says beside markup. All pieces' content and arguments add up to the text without its markup."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class CallParser:
    """Finds calls in a text that is pushed bit by bit; how it is cut changes nothing but the pieces.

    A call begins where markup is complete up to the brace of its arguments, and lasts to the brace that closes them.
    Anything else, half a call's markup or one of its parts alone, is content, word for word. White space between
    calls, and after them at the end, is markup. What may become markup is held back.
    """

    def __init__(self, markup: Markup) -> None:
        self.num_calls = 0
        self._markup, self._held = markup, ""
        self._step: Callable[[Said], bool] = self._content
        self._object = _ObjectEnd()

    def push(self, text: str) -> Said:
        """What `text` makes certain."""
        said = Said()
        self._held += text
        while self._step(said):
            pass
        return said

    def flush(self) -> Said:
        """What was held back, where the text ends."""
        is_after_call = self._step == self._after_call
        held, self._held = self._held, ""
        return Said("" if is_after_call and held.isspace() else held)

    # Each takes what it can from what is held, and says whether another should go on.

    def _content(self, said: Said) -> bool:
        found = self._markup.first.search(self._held)
        start = len(self._held) if found is None else found.start()
        said.content += self._held[:start]
        if found is not None and found["whole"] is not None:
            return self._begin_call(found, said)
        self._held = self._held[start:]
        return False

    def _begin_call(self, found: re.Match[str], said: Said) -> bool:
        said.calls.append(CallPiece(self.num_calls, found["name"], ""))
        self.num_calls += 1
        return self._go_on(found, self._arguments)

    def _arguments(self, said: Said) -> bool:
        if not self._held:
            return False
        stop = self._object.find(self._held)
        taken, self._held = self._held[:stop], "" if stop is None else self._held[stop:]
        if not said.calls or said.calls[-1].index != self.num_calls - 1:
            said.calls.append(CallPiece(self.num_calls - 1, None, ""))
        said.calls[-1].arguments += taken
        if stop is None:
            return False
        self._object = _ObjectEnd()
        self._step = self._close
        return True

    def _close(self, said: Said) -> bool:
        found = self._markup.close.match(self._held)
        if found is None:
            self._step = self._content
            return True
        return found["whole"] is not None and self._go_on(found, self._after_call)

    def _after_call(self, said: Said) -> bool:
        found = self._markup.next.match(self._held)
        if found is None:
            self._step = self._content
            return True
        if self._markup.end and found["end"] is not None:
            return self._go_on(found, self._content)
        return found["whole"] is not None and self._begin_call(found, said)

    def _go_on(self, found: re.Match[str], step: Callable[[Said], bool]) -> bool:
        self._held = self._held[found.end() :]
        self._step = step
        return True


class _ObjectEnd:
    """Finds the end of a JSON object that arrives bit by bit, by its braces outside strings."""

    def __init__(self) -> None:
        self._depth, self._is_string, self._is_escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """Where it ends, after its last brace; None: not in `text`."""
        for place, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped, self._is_string = char == "\\", char != '"'
            elif char == '"':
                self._is_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    return place + 1
        return None


# What a template takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How one template is told of calls, and writes them."""

    markup: Markup
    has_no_content: bool
    """An assistant's message that has calls and says nothing has content None; else ""."""
    has_text_arguments: bool
    """Arguments are JSON text to it; else objects."""

    def told(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages for the template. Theirs have arguments as text that holds a JSON object, and content as text."""
        return [dict(message) | self._changed(message) for message in messages]

    def _changed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return {}
        calls = message["tool_calls"]
        if not self.has_text_arguments:
            calls = [call | {"function": _with_object(call["function"])} for call in calls]
        return {"tool_calls": calls, "content": message["content"] or (None if self.has_no_content else "")}


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.loads(function["arguments"])}


_PROBE = {"name": "probe", "arguments": '{"a": "b"}'}
_PROBE_CALL = {"id": "call00000", "type": "function", "function": _PROBE}
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
_PROBE_CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
]


def tool_style(template: str) -> ToolStyle:
    """The first style in which a call that the template writes is read back as what it was.

    Templates say nowhere how they spell calls, nor in which of the forms in use they want to be told of one, so each
    is tried: markup DeepSeek's, then Hermes'; content "", then None; arguments as objects, then as text. Raises
    ValueError for a template that takes no tools, and for one where nothing was read back.
    """
    if not takes_tools(template):
        raise ValueError("the model's chat template does not take any tools")
    if (style := _style_found(template)) is None:
        names = " nor ".join(markup.name for markup in MARKUPS)
        raise ValueError(f"the model's chat template writes calls in neither {names} markup")
    return style


@lru_cache(maxsize=8)
def _style_found(template: str) -> ToolStyle | None:
    styles = starmap(ToolStyle, product(MARKUPS, (False, True), (False, True)))
    return next((style for style in styles if _is_read_back(style, template)), None)


def _is_read_back(style: ToolStyle, template: str) -> bool:
    options = {"bos_token": "", "eos_token": "", "add_generation_prompt": False}
    try:
        written = render(style.told(_PROBE_CHAT), template=template, tools=[_PROBE_TOOL], **options)
        # Before it a template may show how calls are written.
        *_, last = CallParser(style.markup).push(written).calls or [CallPiece(0, None, "null")]
        return last.name == _PROBE["name"] and json.loads(last.arguments) == json.loads(_PROBE["arguments"])
    except ValueError:
        return False
