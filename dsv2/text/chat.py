"""The one place where a conversation becomes a prompt: jinja chat templates, rendered in a sandbox.
Paper: none; formats of the model cards of DeepSeek-V2-Chat and DeepSeek-V2.5.
Does not: tools, images, or a system prompt of its own.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from dsv2.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

ROLES = ("system", "user", "assistant")

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
    messages: Sequence[Mapping[str, str]],
    *,
    template: str,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
) -> str:
    """The prompt that `template` makes of `messages`, as transformers renders it.

    Args: messages, one or more of {"role": system | user | assistant, "content": str} and no other key;
    template, jinja text that sees messages, bos_token, eos_token, add_generation_prompt, `raise_exception`
    and a `tojson` that does not escape HTML. Raises ValueError, in one line, for messages not of this form
    and for whatever goes wrong in the template: its syntax, its own refusal, an attempt to leave the sandbox.

    The prompt is for reading. To encode a conversation use `encode_chat`: a string no longer tells which
    "<eos>" a user typed.
    """
    plain = [_checked(message, place) for place, message in enumerate(_checked_list(messages))]
    try:
        return _compile(template).render(
            messages=plain,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            # Templates written for transformers compare these two with none, not asking if they are defined.
            tools=None,
            documents=None,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"chat template failed: {_one_line(error)}") from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation, with exactly one bos, at the front, whatever the template emits.

    Args: as `render`; template None means the tokenizer's own, else DEEPSEEK_V2. With `add_generation_prompt`
    the ids end where the assistant's answer begins. Raises ValueError as `render` and `Tokenizer.encode` do.

    Control tokens come from the template alone. A message that spells one ("what does <eos> mean?") is
    neither refused nor altered: its spelling is encoded as the text it is. For that, such a spelling is
    pulled apart by a Unicode noncharacter before the template runs, so that it is not found afterwards, and
    joined again before it is encoded. So is the start of a control token at the end of a message, which
    another message could complete. What a template spells in ordinary text (V2's "User: ") a message can
    still imitate.
    """
    if template is None:
        template = DEEPSEEK_V2 if tokenizer.chat_template is None else tokenizer.chat_template
    checked = [_checked(message, place) for place, message in enumerate(_checked_list(messages))]
    guard = _unused_noncharacter([template, *(message["content"] for message in checked)])
    prompt = render(
        [message | {"content": _pull_apart(message["content"], tokenizer, guard)} for message in checked],
        template=template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
    )
    ids = tokenizer.encode_split([piece.replace(guard, "") for piece in tokenizer.split_special(prompt)])
    return _with_one_bos(ids, tokenizer)


def _with_one_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    bos_id = tokenizer.bos_id
    if bos_id == tokenizer.eos_id:  # past the front the same id ends a turn
        return [bos_id, *ids[ids[:1] == [bos_id] :]]
    return [bos_id, *(i for i in ids if i != bos_id)]


def _checked_list(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"messages is of type {type(messages).__name__}, expected a list of messages")
    if not messages:
        raise ValueError("messages is empty, expected at least one message")
    return messages


def _checked(message: Mapping[str, str], place: int) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        got = list(message) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"message {place} has {got}, expected the keys 'role' and 'content'")
    if message["role"] not in ROLES:
        raise ValueError(f"message {place} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        got = type(message["content"]).__name__
        raise ValueError(f"message {place} has content of type {got}, expected str")
    return dict(message)


@lru_cache(maxsize=8)
def _compile(template: str) -> "jinja2.Template":
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
    return environment.from_string(template)


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
