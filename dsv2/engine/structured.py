"""Outputs of a given form: `StructuredOutputs` says which, as vLLM does; a `Matcher` says which tokens may come next.

`llguidance` does the parsing. What is ours are limits: a request must not take the process down, nor its time. Forms
come from strangers, and llguidance's own limits leave holes, which the checks here close before it sees a form.
Draws no token, knows no scheduler, and needs neither torch nor, until a form is used, llguidance.
"""

from __future__ import annotations

import json
import math
import reprlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dsv2.config.schema import require
from dsv2.engine.tool_calls import ToolCalls

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from dsv2.text import Tokenizer

T = TypeVar("T")

MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 4096
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024
"""Of one choice."""
MAX_CHOICES_CHARS = 65_536
"""Of all choices."""
MAX_GRAMMAR_CHARS = 16_384
MAX_GRAMMAR_LINES = 400
"""A rule takes a line; the time to report an error deep inside rules grows with the square of their number."""
MAX_ALTERNATIVES = 256
"""Where all of them begin alike and recur, a step's time grows with the cube of their number."""
MAX_MULTIPLES = 100_000
"""States of the automata for a schema's `multipleOf`, which llguidance builds at once and doesn't limit."""

# A tenth of llguidance's own limits and less: a step comes between two tokens of everybody. An object of 250 optional
# properties fits in a row, and 50,000 states of a lexer into 100 MB.
_LIMITS = {
    "max_items_in_row": 1000,
    "step_max_items": 4000,
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 5000,
    "verbose_errors": False,
}
_STACK_BYTES = 256 << 20
"""For compiling, which recurs as deep as rules or references do: 8 MB end, with the process, at about 1000."""
_MAX_COMPILED = 64
_MAX_REASON_CHARS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What form an output must have; exactly one is given. Raises ValueError that names the field and what is wrong.

    Whether a form can be had is for `Grammars.matcher` to say.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as text or as what that stands for. Kept as text."""
    json_object: bool | None = None
    """True: any JSON object."""
    regex: str | None = None
    """Matches all of the output; Rust's syntax, without look-around and back references."""
    choice: Sequence[str] | None = None
    """The output is one of these. Kept as a tuple."""
    grammar: str | None = None
    """In llguidance's dialect of Lark; without `%json`."""
    tool_calls: ToolCalls | None = None
    """Calls with arguments for their schemas. Of the server's making: no field of a request."""

    def __post_init__(self) -> None:
        given = [name for name in _CHECKS if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"structured_outputs has {' and '.join(given) or 'no form'}, expected exactly one of {', '.join(_CHECKS)}",
        )
        object.__setattr__(self, given[0], _CHECKS[given[0]](getattr(self, given[0])))

    @property
    def form(self) -> str:
        """The name of the field that is given."""
        return next(name for name in _CHECKS if getattr(self, name) is not None)


class Grammars:
    """Compiles forms for one vocabulary, and keeps the compiled ones that were used last. Threads may share it.

    Args:
        vocab_size: W, the model's; ids of it that the tokenizer lacks are never allowed.
        eos_token_ids: of the model. Those outside the tokenizer's vocabulary are ignored; if none is left, its own
            EOS stands in.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.vocab_size, self.num_ids = vocab_size, tokenizer.vocab_size
        self.eos_token_ids = sorted(i for i in eos_token_ids if i < tokenizer.vocab_size) or [tokenizer.eos_id]
        self.eos_mask = _mask_of(self.eos_token_ids, vocab_size)
        self._tokenizer = tokenizer
        self._compiled: dict[StructuredOutputs, LLMatcher] = {}
        self._lock = threading.Lock()

    def matcher(self, structured: StructuredOutputs) -> Matcher:
        """Of an output's beginning. The first call takes about a second, the first one for a form some milliseconds.

        Raises ValueError, naming the field and the reason, for a form that is malformed, that no output has, or that
        takes more than is allowed; and where llguidance is not installed.
        """
        with self._lock:
            compiled = self._compiled.pop(structured, None)
        compiled = compiled or self.compile(structured)
        with self._lock:
            self._compiled[structured] = compiled
            if len(self._compiled) > _MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]
        return Matcher(self, structured, compiled.deep_copy())

    def compile(self, structured: StructuredOutputs) -> LLMatcher:
        """llguidance's matcher of an output's beginning, not kept. Raises ValueError as `matcher` does."""
        compiled = _on_deep_stack(lambda: self._parse(structured))
        # The first step tells of forms that no output has, and of most that take too much, before anything is drawn.
        first = compiled.deep_copy()
        first.compute_bitmask()
        _check(structured, first)
        return compiled

    def forget(self, structured: StructuredOutputs) -> None:
        """To be called when a copy of what is kept for this form has failed."""
        with self._lock:
            self._compiled.pop(structured, None)

    def _parse(self, structured: StructuredOutputs) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise ValueError("structured_outputs needs llguidance: pip install llguidance") from error

        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._vocabulary, _grammar_of(structured, self._tokenizer), log_level=0, limits=limits)
        _check(structured, matcher)
        return matcher

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        require(
            self.num_ids <= self.vocab_size,
            f"structured_outputs: the tokenizer has {self.num_ids} ids, expected at most the model's {self.vocab_size}",
        )
        words = TokenizerWrapper(_Words(self._tokenizer))
        return LLTokenizer(words, n_vocab=self.num_ids, eos_token=self.eos_token_ids)


class Matcher:
    """One output's place in its form."""

    def __init__(self, grammars: Grammars, structured: StructuredOutputs, inner: LLMatcher) -> None:
        """`inner`: a copy of what `grammars` keeps for the form. See `Grammars.matcher`."""
        self._grammars, self._structured, self._inner = grammars, structured, inner
        self._token_ids: list[int] = []
        self._is_copy = True

    @property
    def can_end(self) -> bool:
        """Whether what was accepted is all of an output."""
        return self._inner.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end can follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def mask(self) -> np.ndarray:
        """[ceil(W / 32)] int32: bit i % 32 of word i // 32 is set where token i may come next. Never all zero.

        Raises ValueError where the form turns out to take more than is allowed; the output can't be continued then.
        """
        bits = np.frombuffer(self._try(lambda inner: inner.compute_bitmask()), dtype="<i4")
        mask = np.zeros_like(self._grammars.eos_mask)
        mask[: len(bits)] = bits
        if not self.can_end:  # a grammar may name tokens by number, and so an end as well
            mask &= ~self._grammars.eos_mask
        require(bool(mask.any()), _refusal(self._structured, "no token can come next, and the output may not end"))
        return mask

    def accept(self, token_id: int) -> None:
        """The output goes on with this token. Ends that follow an end change nothing.

        Raises ValueError as `mask` does; and for a token that may not come next, which changes nothing.
        """
        if self.is_finished and token_id in self._grammars.eos_token_ids:
            return
        is_known = 0 <= token_id < self._grammars.num_ids
        num_taken = self._try(lambda inner: inner.try_consume_tokens([token_id])) if is_known else 0
        require(num_taken == 1, _refusal(self._structured, f"token id {token_id} may not come next"))
        self._token_ids.append(token_id)

    def _try(self, call: Callable[[LLMatcher], T]) -> T:
        result = call(self._inner)
        # Copies share their lexer: it fails for all when the states that all have visited are too many, or when one
        # came upon a costly place. Only a failure alone is this output's own.
        if self._inner.is_error() and self._is_copy:
            self._grammars.forget(self._structured)
            self._inner, self._is_copy = self._grammars.compile(self._structured), False
            self._inner.consume_tokens(self._token_ids)
            result = call(self._inner)
        _check(self._structured, self._inner)
        return result


class _Words:
    """A tokenizer as llguidance takes it. Not from a tokenizer.json: there llguidance misreads added tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # Control tokens are no text: they come only where a grammar names them.
        self.special_token_ids = sorted(tokenizer.control_tokens.values())

    def __call__(self, text: str) -> list[int]:
        """How text that must come is spelled. ValueError for bytes: so llguidance finds out that it takes no bytes."""
        return self._tokenizer.encode(text)


def _check(structured: StructuredOutputs, matcher: LLMatcher) -> None:
    """ValueError that names the field and the reason where llguidance has given up."""
    require(not matcher.is_error(), _refusal(structured, matcher.get_error()))


def _refusal(structured: StructuredOutputs, reason: str) -> str:
    reason = reason.replace("<non-verbose/>", "").replace("NoExtensionBias", "nothing can come next").strip()
    if len(reason) > _MAX_REASON_CHARS:  # it quotes the form, and says last what is wrong with it
        reason = f"{reason[: _MAX_REASON_CHARS // 2]} ... {reason[-_MAX_REASON_CHARS // 2 :]}"
    return f"structured_outputs.{structured.form}={reprlib.repr(getattr(structured, structured.form))}: {reason}"


def _grammar_of(structured: StructuredOutputs, tokenizer: Tokenizer) -> str:
    from llguidance import LLMatcher

    if structured.json is not None or structured.json_object is not None:
        schema: Any = structured.json or {"type": "object"}
        return LLMatcher.grammar_from_json_schema(schema)
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        # Characters by number: none of them has a meaning.
        literals = ("".join(rf"\x{{{ord(char):x}}}" for char in text) for text in structured.choice)
        return LLMatcher.grammar_from_regex("|".join(literals))
    lark = structured.tool_calls.as_lark(tokenizer) if structured.tool_calls else str(structured.grammar)
    return LLMatcher.grammar_from_lark(lark)


def _on_deep_stack(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        previous = threading.stack_size(_STACK_BYTES)
        try:
            future = pool.submit(call)
        finally:
            threading.stack_size(previous)
        return future.result()


def _mask_of(token_ids: Collection[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<i4")


# Checks of a form's text, before llguidance sees it ------------------------------------------------------------------


def _text(name: str, value: Any, max_chars: int) -> str:
    name = f"structured_outputs.{name}"
    require(isinstance(value, str), f"{name}={reprlib.repr(value)} must be a string")
    require(0 < len(value) <= max_chars, f"{name} has {len(value)} characters, expected 1 to {max_chars}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}") from error
    return value


def _schema(value: Any) -> str:
    name = f"structured_outputs.json={reprlib.repr(value)}"
    try:
        text = json.dumps(dict(value), allow_nan=False) if isinstance(value, Mapping) else value
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from error
    _text("json", text, MAX_SCHEMA_CHARS)
    try:
        schema = json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error or 'a number out of range'}") from error
    require(isinstance(schema, dict), f"{name} must be an object, a JSON schema")
    tables = list(_tables(schema))
    branches = [table.get(key) for table in tables for key in ("anyOf", "oneOf")]
    _check_alternatives("json", sum(len(each) for each in branches if isinstance(each, list)))
    _check_multiples([m for table in tables if isinstance(m := table.get("multipleOf"), (int, Decimal))])
    return text


def _refuse_constant(spelled: str) -> float:
    raise ValueError(f"{spelled} is no number of JSON")


def _tables(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects inside, at any depth."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _check_alternatives(name: str, count: int) -> None:
    require(
        count <= MAX_ALTERNATIVES,
        f"structured_outputs.{name} has {count} alternatives in all, expected at most {MAX_ALTERNATIVES}",
    )


def _check_multiples(steps: list[int | Decimal]) -> None:
    """Several that hold for the same number become their least common multiple, in units of the last decimal."""
    for step in steps:
        # Keeps exponents small, before anything is computed with them.
        is_sane = Decimal("1e-9") <= step <= 10**9
        require(is_sane, f"structured_outputs.json: multipleOf={reprlib.repr(step)} must be in 1e-9..1e9")
    unit = 10 ** max([0, *(-int(Decimal(step).as_tuple().exponent) for step in steps)])
    num_states = len(steps) * math.lcm(*(int(Fraction(step) * unit) for step in steps))
    require(
        num_states <= MAX_MULTIPLES,
        f"structured_outputs.json: {len(steps)} multipleOf times their least common multiple, in units of the last "
        f"decimal, is {reprlib.repr(num_states)}, expected at most {MAX_MULTIPLES}",
    )


def _json_object(value: Any) -> bool:
    require(value is True, f"structured_outputs.json_object={reprlib.repr(value)} must be true")
    return value


def _regex(value: Any) -> str:
    return _text("regex", value, MAX_REGEX_CHARS)


def _choice(value: Any) -> tuple[str, ...]:
    name = "structured_outputs.choice"
    is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
    require(is_list, f"{name}={reprlib.repr(value)} must be a list of strings")
    require(0 < len(value) <= MAX_CHOICES, f"{name} has {len(value)} strings, expected 1 to {MAX_CHOICES}")
    choices = tuple(_text(f"choice[{i}]", text, MAX_CHOICE_CHARS) for i, text in enumerate(value))
    num_chars = sum(map(len, choices))
    require(num_chars <= MAX_CHOICES_CHARS, f"{name} has {num_chars} characters, expected at most {MAX_CHOICES_CHARS}")
    return choices


def _grammar(value: Any) -> str:
    text = _text("grammar", value, MAX_GRAMMAR_CHARS)
    num_lines = text.count("\n") + 1
    require(
        num_lines <= MAX_GRAMMAR_LINES,
        f"structured_outputs.grammar has {num_lines} lines, expected at most {MAX_GRAMMAR_LINES}",
    )
    _check_alternatives("grammar", text.count("|"))
    require("%json" not in text, "structured_outputs.grammar must not hold %json: give a schema as json")
    return text


def _tool_calls(value: ToolCalls) -> ToolCalls:
    _schema({"anyOf": [json.loads(schema) for _, schema in value.schemas]})  # limits are for all of them together
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "json": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "tool_calls": _tool_calls,
}
