"""Outputs of a given form: what is drawn within the masks has it, and no form takes down the process or its time."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv2.engine import structured
from dsv2.engine.structured import Grammars, Matcher, StructuredOutputs
from dsv2.text import Tokenizer

pytest.importorskip("llguidance", reason="needs llguidance")

TEXTS = [
    'The quick brown fox jumps over the lazy dog: {"name": "fox", "tags": ["quick", "brown"], "age": 3}. ' * 2,
    "def add(left, right):\n    return left + right  # the sum of both\n\n",
    "für Größe; 深度求索：混合专家模型",
]
VOCAB_SIZE = 407  # not a multiple of 32, and larger than the tokenizer's
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["quick", "brown"]}, "maxItems": 3},
        "kind": {"const": "Größe"},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
REGEXES = [r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(The|A) (quick |brown ){0,3}fox!?", r"für|深度?|.[a-c]{2,5}", r"[^x]{1,9}"]
CHOICES = ("fox", "foxes", "für", "a|b", '"', "\\x", "\n\x00\x7f", "深度求索", "😀", " ")
LISP = 'start: list\nlist: "(" (ATOM | list)? (" " (ATOM | list))* ")"\nATOM: /[a-z]{1,3}/\n'


@cache
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@cache
def grammars() -> Grammars:
    """Shared, so that the vocabulary is built once."""
    assert small().vocab_size < VOCAB_SIZE
    return Grammars(small(), VOCAB_SIZE, [small().eos_id])


def matcher(**form: Any) -> Matcher:
    return grammars().matcher(StructuredOutputs(**form))


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, max_tokens: int = 400) -> str:
    """The text of random tokens up to an end; soon only those are drawn that close something, where there are any."""
    rng, token_ids = random.Random(seed), []
    while len(token_ids) < max_tokens:
        choices = allowed(matcher)
        is_end = tokenizer.eos_id in choices
        assert is_end == matcher.can_end
        if is_end and (len(choices) == 1 or rng.random() < 0.2):
            return tokenizer.decode(token_ids)
        choices = [i for i in choices if i != tokenizer.eos_id]
        closing = [i for i in choices if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b")")]
        token_ids.append(rng.choice(closing if closing and len(token_ids) > 20 else choices))
        matcher.accept(token_ids[-1])
    raise AssertionError(f"no end after {max_tokens} tokens: {tokenizer.decode(token_ids)!r}")


def is_person(value: Any) -> bool:
    return (
        {"name", "age", "kind"} <= set(value) <= set(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and set(value.get("tags", [])) <= {"quick", "brown"}
        and value["kind"] == "Größe"
    )


# What is drawn within the masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_within_a_schema_gives_json_of_the_schema(seed: int) -> None:
    assert is_person(json.loads(walk(matcher(json=SCHEMA), small(), seed)))


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_within_json_object_gives_an_object(seed: int) -> None:
    assert isinstance(json.loads(walk(matcher(json_object=True), small(), seed)), dict)


@pytest.mark.parametrize("regex", REGEXES)
def test_walks_within_a_regex_match_all_of_it(regex: str) -> None:
    for seed in range(10):
        assert re.fullmatch(regex, walk(matcher(regex=regex), small(), seed))


def test_walks_within_choices_give_each_of_them_and_nothing_else() -> None:
    assert {walk(matcher(choice=CHOICES), small(), seed) for seed in range(200)} == set(CHOICES)


@pytest.mark.parametrize("seed", range(10))
def test_a_walk_within_a_grammar_is_of_it(seed: int) -> None:
    left = re.sub("[a-z]{1,3}", "a", walk(matcher(grammar=LISP), small(), seed))
    while (fewer := re.sub(r"\((a?( a)*)\)", "a", left)) != left:
        left = fewer
    assert left == "a"


# Ends and tokens that are no text ------------------------------------------------------------------------------------


def test_an_end_is_allowed_only_where_the_output_is_complete() -> None:
    m, eos = matcher(regex="ab?"), small().eos_id
    seen = [(m.can_end, eos in allowed(m), m.is_finished)]
    for token_id in small().encode("a") + small().encode("b"):
        m.accept(token_id)
        seen.append((m.can_end, eos in allowed(m), m.is_finished))
    assert seen == [(False, False, False), (True, True, False), (True, True, True)]


@pytest.mark.parametrize("text", ["a", "ab"])
def test_after_an_end_only_ends_follow(text: str) -> None:
    m, eos = matcher(regex="ab?"), small().eos_id
    for token_id in [*small().encode("a"), *small().encode(text[1:]), eos, eos]:
        m.accept(token_id)
    assert (m.is_finished, m.can_end, allowed(m)) == (True, True, [eos])


def test_all_of_several_ends_are_allowed() -> None:
    ends = [small().eos_id, small().bos_id]
    m = Grammars(small(), VOCAB_SIZE, [*ends, VOCAB_SIZE - 1]).matcher(StructuredOutputs(choice=["a"]))
    m.accept(small().encode("a")[0])
    assert allowed(m) == sorted(ends)


def test_the_tokenizers_end_stands_in_where_the_model_has_none() -> None:
    m = Grammars(small(), VOCAB_SIZE, [VOCAB_SIZE - 1]).matcher(StructuredOutputs(choice=["a"]))
    m.accept(small().encode("a")[0])
    assert allowed(m) == [small().eos_id]


def test_a_grammar_that_names_every_token_gets_no_padded_ids_and_no_early_end() -> None:
    m = matcher(grammar="start: <[*]> <[*]>")
    assert len(m.mask()) == -(-VOCAB_SIZE // 32)
    assert allowed(m) == [i for i in range(small().vocab_size) if i != small().eos_id]


def test_a_grammar_that_names_a_padded_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"structured_outputs.grammar=.*Token range end too large"):
        matcher(grammar=f"start: <[{VOCAB_SIZE - 1}]>")


def test_control_tokens_are_no_text() -> None:
    assert not {small().bos_id, small().eos_id} & set(allowed(matcher(regex="(.|\n)+")))


def test_an_end_in_the_middle_of_a_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"structured_outputs.grammar=.*no token can come next"):
        matcher(grammar=f'start: <[{small().eos_id}]> "a"').mask()


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE - 1, VOCAB_SIZE, 10**12])
def test_a_token_that_may_not_come_is_named_and_changes_nothing(token_id: int) -> None:
    m = matcher(regex="[a-c]+")
    before = allowed(m)
    for each in (token_id, small().encode("d")[0], small().eos_id):
        with pytest.raises(ValueError, match=f"structured_outputs.regex='.*': token id {each} may not come next"):
            m.accept(each)
    assert allowed(m) == before


def test_matchers_of_one_form_are_independent() -> None:
    one, other = matcher(choice=["ab", "cd"]), matcher(choice=["ab", "cd"])
    one.accept(small().encode("a")[0])
    assert allowed(other) == allowed(matcher(choice=["ab", "cd"])) != allowed(one)


def test_a_model_with_fewer_ids_than_its_tokenizer_is_named() -> None:
    num_ids = small().vocab_size
    with pytest.raises(
        ValueError, match=f"the tokenizer has {num_ids} ids, expected at most the model's {num_ids - 1}"
    ):
        Grammars(small(), num_ids - 1, [small().eos_id]).matcher(StructuredOutputs(choice=["a"]))


# Forms that are wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "structured_outputs has no form, expected exactly one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs has regex and choice, expected exactly one"),
        ({"json": 3}, "structured_outputs.json=3 must be a string"),
        ({"json": "[]"}, r"structured_outputs.json='\[\]' must be an object, a JSON schema"),
        ({"json": "{"}, r"structured_outputs.json='{' is not JSON: Expecting property name"),
        ({"json": '{"const": NaN}'}, "structured_outputs.json=.* is not JSON: NaN is no number"),
        ({"json": '{"const": 1e99999999999999999999}'}, "structured_outputs.json=.* is not JSON"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json=.* cannot be written as JSON"),
        ({"json": {"const": object()}}, "structured_outputs.json=.* cannot be written as JSON"),
        ({"json": '{"items":' * 5000}, "structured_outputs.json=.* is not JSON: maximum recursion"),
        ({"json": {"title": "x" * 65_536}}, "structured_outputs.json has 65549 characters, expected 1 to 65536"),
        ({"json": {"anyOf": [{}] * 200, "oneOf": [{}] * 57}}, "json has 257 alternatives in all, expected at most 256"),
        ({"json": {"multipleOf": 1_000_003}}, "json: 1 multipleOf .* is 1000003, expected at most 100000"),
        ({"json": {"allOf": [{"multipleOf": n} for n in (97, 0.89)]}}, "json: 2 multipleOf .* is 1726600, expected at"),
        ({"json": '{"multipleOf": 1e999999}'}, r"json: multipleOf=Decimal\('1E\+999999'\) must be in 1e-9..1e9"),
        ({"json": '{"multipleOf": 0}'}, "json: multipleOf=0 must be in 1e-9..1e9"),
        ({"json_object": False}, "structured_outputs.json_object=False must be true"),
        ({"regex": ""}, "structured_outputs.regex has 0 characters, expected 1 to 4096"),
        ({"regex": "a" * 4097}, "structured_outputs.regex has 4097 characters, expected 1 to 4096"),
        ({"regex": "a\ud800"}, "structured_outputs.regex has a lone surrogate at character 1"),
        ({"choice": "abc"}, "structured_outputs.choice='abc' must be a list of strings"),
        ({"choice": []}, "structured_outputs.choice has 0 strings, expected 1 to 1024"),
        ({"choice": ["a"] * 1025}, "structured_outputs.choice has 1025 strings, expected 1 to 1024"),
        ({"choice": ["a", 7]}, r"structured_outputs.choice\[1\]=7 must be a string"),
        ({"choice": ["x" * 1024] * 65}, "structured_outputs.choice has 66560 characters, expected at most 65536"),
        ({"grammar": "start: a\n" * 400}, "structured_outputs.grammar has 401 lines, expected at most 400"),
        ({"grammar": "start: " + "|" * 257}, "structured_outputs.grammar has 257 alternatives in all, expected at"),
        ({"grammar": "start: %json {}"}, "structured_outputs.grammar must not hold %json: give a schema as json"),
    ],
)
def test_a_form_that_cannot_be_taken_is_named_with_what_was_expected(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputs(**form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 3}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "#"}}, "nothing can come next"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch resources"),
        ({"json": {"pattern": "\ud800", "type": "string"}}, "unexpected end of hex escape"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "nothing can come next"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": "start"}, "Expected"),
    ],
)
def test_a_form_that_does_not_compile_is_named_with_the_reason(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^structured_outputs\.{next(iter(form))}=.*{message}"):
        matcher(**form)


def test_a_reason_is_short_however_long_the_form() -> None:
    with pytest.raises(ValueError, match="structured_outputs.regex") as caught:
        matcher(regex="(" * 4000)
    assert len(str(caught.value)) < 1000


def test_a_schema_is_kept_as_text_and_forms_compare_by_value() -> None:
    one, same = StructuredOutputs(json=SCHEMA), StructuredOutputs(json=json.dumps(SCHEMA))
    assert one == same and len({one, same, StructuredOutputs(choice=["a"])}) == 2
    assert StructuredOutputs(choice=["a"]).choice == ("a",)


def test_without_llguidance_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="pip install llguidance"):
        Grammars(small(), VOCAB_SIZE, []).matcher(StructuredOutputs(choice=["a"]))


def test_the_module_needs_neither_torch_nor_llguidance_to_be_imported() -> None:
    code = "import sys, dsv2.engine.structured; sys.exit(bool({'torch', 'llguidance'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# Forms that take too much --------------------------------------------------------------------------------------------


def draw_until_refused(max_tokens: int = 200, **form: Any) -> None:
    m, rng = matcher(**form), random.Random(0)
    for _ in range(max_tokens):
        m.accept(rng.choice([i for i in allowed(m) if i != small().eos_id]))


def count_compiled(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The regexes compiled from now on, in order."""
    compiled: list[str | None] = []
    compile_form = grammars.compile

    def note_and_compile(form: StructuredOutputs) -> Any:
        compiled.append(form.regex)
        return compile_form(form)

    monkeypatch.setattr(grammars, "compile", note_and_compile)
    return compiled


def recursive_alternatives(count: int) -> Mapping[str, Any]:
    branch = {"type": "array", "items": {"$ref": "#/$defs/any"}}
    return {"$defs": {"any": {"anyOf": [branch] * count}}, "$ref": "#/$defs/any"}


@pytest.mark.parametrize(
    ("form", "limit"),
    [
        ({"regex": "(a?){1000}a{1000}"}, "too many expressions"),
        ({"regex": "a{1000000000}"}, "too many expressions"),
        ({"regex": "((a{1000}){1000}){1000}"}, "too many expressions"),
        ({"regex": "(((([a-z]{1,100}){1,100}){1,100}){1,100}){1,100}"}, "too many expressions"),
        ({"json": {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}}, "too many expressions"),
        ({"json": recursive_alternatives(150)}, "Current row has 1050 items"),
        ({"grammar": "start: A\nA: /.*a.{20}/ & /.*b.{21}/ & ~/.*c.{22}/"}, "fuel exhausted"),
        ({"grammar": 'start: x{1000000000}\nx: "a"'}, "Too many items"),
        ({"grammar": 'start: x{1,100000}\nx: "a" |'}, "Current row has"),
        ({"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(30)) + 'A30: "a"'}, "too big"),
    ],
)
def test_a_form_that_takes_too_much_is_refused_and_names_the_limit(form: dict[str, Any], limit: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^structured_outputs\.{next(iter(form))}=.*({limit})"):
        draw_until_refused(**form)


@pytest.mark.parametrize("regex", ["(a?){50}a{50}", "((a|aa)+)+$", "((a|aa)+)+", "(a|b)*a(a|b){100}"])
def test_a_regex_that_makes_others_backtrack_is_matched_within_the_limits(regex: str) -> None:
    texts = [walk(matcher(regex=regex), small(), seed) for seed in range(3)]
    assert all(re.fullmatch("[ab]+", text) for text in texts)


def test_a_long_chain_of_references_compiles_whatever_the_callers_stack() -> None:
    # In a process of its own: where this fails, no exception tells of it.
    code = """
import threading
from tests.engine.test_structured import matcher
links = {f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(1300)}
schema = {"$defs": links | {"1300": {"type": "null"}}, "$ref": "#/$defs/0"}
threading.stack_size(512 << 10)
thread = threading.Thread(target=lambda: print("compiled", matcher(json=schema).mask().any()))
thread.start()
thread.join()
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "compiled True\n"), done.stderr


def test_a_failure_that_other_outputs_of_the_form_caused_is_not_this_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(structured._LIMITS, "max_lexer_states", 300)
    shared, form = Grammars(small(), VOCAB_SIZE, [small().eos_id]), StructuredOutputs(regex="(a|b)*a(a|b){40}")
    victim, spender, rng = shared.matcher(form), shared.matcher(form), random.Random(0)
    victim.accept(small().encode("a")[0])
    before = allowed(victim)
    with pytest.raises(ValueError, match="too many states"):
        for _ in range(10_000):
            spender.accept(rng.choice([i for i in allowed(spender) if i != small().eos_id]))
    assert allowed(victim) == before


def test_what_has_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own, form = Grammars(small(), VOCAB_SIZE, [small().eos_id]), StructuredOutputs(regex="a{1000000000}")
    m = own.matcher(form)
    with pytest.raises(ValueError, match="too many expressions"):
        m.accept(allowed(m)[0])
    compiled = count_compiled(own, monkeypatch)
    own.matcher(form)
    assert compiled == [form.regex]


def test_compiled_forms_are_kept_and_the_ones_used_last_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_MAX_COMPILED", 2)
    own = Grammars(small(), VOCAB_SIZE, [small().eos_id])
    compiled = count_compiled(own, monkeypatch)
    for regex in ("a", "b", "a", "c", "a", "b"):
        own.matcher(StructuredOutputs(regex=regex))
    assert compiled == ["a", "b", "c", "b"]


# DeepSeek-V2's own vocabulary ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> tuple[Grammars, Tokenizer]:
    path = os.environ.get("DSV2_OFFICIAL_TOKENIZER")
    if not path:
        pytest.skip("DSV2_OFFICIAL_TOKENIZER does not name DeepSeek-V2's tokenizer.json")
    tokenizer = Tokenizer.load(path)
    return Grammars(tokenizer, 102_400, [tokenizer.eos_id]), tokenizer


def test_walks_over_the_official_vocabulary_give_json_of_the_schema(official: tuple[Grammars, Tokenizer]) -> None:
    grammars, tokenizer = official
    for seed in range(5):
        text = walk(grammars.matcher(StructuredOutputs(json=SCHEMA)), tokenizer, seed)
        assert is_person(json.loads(text))


def test_the_letters_that_are_added_tokens_are_text(official: tuple[Grammars, Tokenizer]) -> None:
    # Other readers of the file take the token "ü" for the byte 0xFC, which no text holds.
    grammars, tokenizer = official
    m = grammars.matcher(StructuredOutputs(regex="(ü|ö)+"))
    assert {"ü", "ö"} <= {tokenizer.decode([i]) for i in allowed(m) if i > 100_000}


def test_the_official_vocabularys_padded_ids_are_never_allowed(official: tuple[Grammars, Tokenizer]) -> None:
    grammars, tokenizer = official
    m = grammars.matcher(StructuredOutputs(grammar="start: <[*]> <[*]>"))
    assert (len(m.mask()), max(allowed(m))) == (3200, tokenizer.vocab_size - 1)
