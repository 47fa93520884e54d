"""`ToolCalls`: an output that is nothing but calls, in a model's own markup, with arguments that fit their schemas.

Says so in llguidance's dialect of Lark. Checks no schema and parses no output.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from dsv2.text import Tokenizer
from dsv2.text.tools import Markup


@dataclass(frozen=True, slots=True)
class ToolCalls:
    markup: Markup
    schemas: tuple[tuple[str, str], ...]
    """Names of functions, at least one, and JSON schemas of their arguments, each an object and text on one line."""
    is_several: bool
    """Any number of calls from one on; else exactly one."""

    def as_lark(self, tokenizer: Tokenizer) -> str:
        """What `tokenizer` has as control tokens the output has as such."""
        markup = self.markup
        more = [f"({_spelled(markup.separator, tokenizer)} call)*"] if self.is_several else []
        rules = [_rule("start", [_spelled(markup.begin, tokenizer), "call", *more, _spelled(markup.end, tokenizer)])]
        rules.append(_rule("call", [" | ".join(f"call_{i}" for i in range(len(self.schemas)))]))
        for i, (name, schema) in enumerate(self.schemas):
            before = _spelled(markup.call + name + markup.after_name, tokenizer)
            rules.append(_rule(f"call_{i}", [before, f"arguments_{i}", _spelled(markup.call_end, tokenizer)]))
            rules.append(_rule(f"arguments_{i}", ["%json", schema]))
        return "\n".join(rules)


def _rule(name: str, parts: Iterable[str]) -> str:
    return f"{name}: {' '.join(part for part in parts if part)}"


def _spelled(text: str, tokenizer: Tokenizer) -> str:
    """`text` as it must come: literals, and control tokens by number."""
    pieces = tokenizer.split_special(text)
    literals = [json.dumps(piece, ensure_ascii=False) if piece else "" for piece in pieces[::2]]
    controls = [f"<[{tokenizer.control_tokens[piece]}]>" for piece in pieces[1::2]]
    both = [part for pair in zip(literals, [*controls, ""], strict=True) for part in pair]
    return " ".join(part for part in both if part)
