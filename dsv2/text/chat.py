"""The one place where a conversation becomes a prompt: jinja chat templates, rendered in a sandbox.
Paper: none; formats of the model cards of DeepSeek-V2-Chat and DeepSeek-V2.5.
Does not: images, a system prompt of its own, or find the calls in what a model says (tools.py does).
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from dsv2.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

ROLES = ("system", "user", "assistant")
"""Of every template; those that take tools know "tool" besides."""

# <bos>{system}\n\nUser: {user}\n\nAssistant: {assistant}<eos>User: ...\n\nAssistant:
DEEPSEEK_V2 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] + '\n\n' -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'User: ' + message['content'] + '\n\n' -}}
  {%- else -%}
    {{- 'Assistant: ' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# <bos>{system}<｜User｜>{user}<｜Assistant｜>{assistant}<eos><｜User｜>...<｜Assistant｜>
DEEPSEEK_V2_5 = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system message must come first') -}}{%- endif -%}
    {{- message['content'] -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- else -%}
    {{- '<｜Assistant｜>' + message['content'] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt that `template` makes of `messages`, as transformers renders it.

    Args: messages, one or more of {"role": system | user | assistant, "content": str} and no other key;
    template, jinja text that sees messages, tools, bos_token, eos_token, add_generation_prompt, `raise_exception`
    and a `tojson` that does not escape HTML; tools, in OpenAI's form. Where the template takes tools, an assistant's
    message may have "tool_calls" and then content None, and there are messages of the role "tool" with a
    "tool_call_id"; what is in these is between caller and template (tools.py knows). Raises ValueError, in one line,
    for messages not of this form, for tools that the template does not take, and for whatever goes wrong in the
    template: its syntax, its own refusal, an attempt to leave the sandbox.

    The prompt is for reading. To encode a conversation use `encode_chat`: a string no longer tells which
    "<eos>" a user typed.
    """
    checked = _checked_list(messages, template)
    if tools and not takes_tools(template):
        raise ValueError("tools are given to a chat template that does not take any, expected none")
    try:
        return _compile(template).render(
            messages=checked,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            # Templates written for transformers compare these two with none, not asking if they are defined.
            tools=list(tools) if tools else None,
            documents=None,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"chat template failed: {_one_line(error)}") from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, with exactly one bos, at the front, whatever the template emits.

    Args: as `render`; template None means `template_of`. With `add_generation_prompt`
    the ids end where the assistant's answer begins. Raises ValueError as `render` and `Tokenizer.encode` do.

    Control tokens come from the template alone. A message or tool that spells one ("what does <eos> mean?") is
    neither refused nor altered: its spelling is encoded as the text it is. For that, such a spelling is
    pulled apart by a Unicode noncharacter before the template runs, so that it is not found afterwards, and
    joined again before it is encoded. So is the start of a control token at the end of a text, which
    another could complete. What a template spells in ordinary text (V2's "User: ") a message can
    still imitate.
    """
    template = template_of(tokenizer) if template is None else template
    checked = _checked_list(messages, template)
    guard = _unused_noncharacter([template, json.dumps([checked, tools], ensure_ascii=False)])
    prompt = render(
        [_guarded(message, tokenizer, guard) | {"role": message["role"]} for message in checked],
        template=template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
        tools=_guarded(tools, tokenizer, guard),
    )
    ids = tokenizer.encode_split([piece.replace(guard, "") for piece in tokenizer.split_special(prompt)])
    return _with_one_bos(ids, tokenizer)


def template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, else DEEPSEEK_V2."""
    return DEEPSEEK_V2 if tokenizer.chat_template is None else tokenizer.chat_template


def _with_one_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos_id = tokenizer.bos_id
    if bos_id == tokenizer.eos_id:  # past the front the same id ends a turn
        return [bos_id, *ids[ids[:1] == [bos_id] :]]
    return [bos_id, *(i for i in ids if i != bos_id)]


@lru_cache(maxsize=8)
def takes_tools(template: str) -> bool:
    """Whether `template` reads `tools`; ValueError where it is no template."""
    import jinja2.meta

    try:
        names = jinja2.meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template failed: {_one_line(error)}") from error
    return "tools" in names


def _checked_list(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"messages is of type {type(messages).__name__}, expected a list of messages")
    if not messages:
        raise ValueError("messages is empty, expected at least one message")
    return [_checked(message, place, template) for place, message in enumerate(messages)]


def _checked(message: Mapping[str, Any], place: int, template: str) -> dict[str, Any]:
    extra = _extra_key(message, template)
    if not isinstance(message, Mapping) or set(message) != {"role", "content"} | extra:
        got = list(message) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"message {place} has {got}, expected the keys 'role' and 'content'")
    if message["role"] not in ROLES and extra != {"tool_call_id"}:
        raise ValueError(f"message {place} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str) and not (message["content"] is None and extra == {"tool_calls"}):
        got = type(message["content"]).__name__
        raise ValueError(f"message {place} has content of type {got}, expected str")
    return dict(message)


def _extra_key(message: Any, template: str) -> set[str]:
    """Which key a message has beside role and content, where the template takes tools."""
    if not isinstance(message, Mapping):
        return set()
    keys = {"assistant": "tool_calls", "tool": "tool_call_id"}
    extra = {key for role, key in keys.items() if message.get("role") == role and key in message}
    return extra if extra and takes_tools(template) else set()


@lru_cache(maxsize=8)
def _compile(template: str) -> "jinja2.Template":
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> "jinja2.Environment":
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            # jinja would print nothing, and raise only when the result is used.
            raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def raise_exception(reason: str) -> NoReturn:
        raise TemplateError(reason)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own escapes HTML

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    return environment


def _one_line(error: Exception) -> str:
    line = getattr(error, "lineno", None)  # jinja's syntax errors have one
    where = "" if line is None else f" (line {line})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _unused_noncharacter(texts: Sequence[str]) -> str:
    """A character that no text holds, of the 32 that Unicode keeps for a program's own use."""
    for candidate in map(chr, range(0xFDD0, 0xFDF0)):
        if not any(candidate in text for text in texts):
            return candidate
    raise ValueError("messages hold every noncharacter from U+FDD0 to U+FDEF, expected one to be left over")


def _guarded(value: Any, tokenizer: Tokenizer, guard: str) -> Any:
    """`value` of JSON with all texts in it pulled apart, an object's keys too."""
    if isinstance(value, str):
        return _pull_apart(value, tokenizer, guard)
    if isinstance(value, Mapping):
        return {_guarded(k, tokenizer, guard): _guarded(item, tokenizer, guard) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(item, tokenizer, guard) for item in value]
    return value


def _pull_apart(content: str, tokenizer: Tokenizer, guard: str) -> str:
    """`content` with `guard` after each character of a control token, or of the start of one at its end."""
    pieces = tokenizer.split_special(content)
    pieces[1::2] = [guard.join(piece) + guard for piece in pieces[1::2]]
    body = pieces[-1].rstrip()  # a template may trim
    longest = max(map(len, tokenizer.control_tokens))
    for start in range(max(0, len(body) - longest), len(body)):
        if any(token.startswith(body[start:]) for token in tokenizer.control_tokens):
            pieces[-1] = body[:start] + guard.join(body[start:]) + guard + pieces[-1][len(body) :]
            break
    return "".join(pieces)
