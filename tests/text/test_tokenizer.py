import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.text import StreamDecoder, Tokenizer
from dsv2.text.tokenizer import _ROUND_TRIP, BOS_TOKEN, EOS_TOKEN, _deepseek_pre_tokenizer

TRUNCATION = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs away, and the dog wakes.",
    "def add(left, right):\n    return left + right  # the sum of both\n\n\ndef twice(x):\n\treturn 2 * x\n",
    "深度求索发布了混合专家模型。模型很大，但是推理很便宜。混合专家模型的推理很快。",
    "In 1984, 2001 and 2048 there were 3.14 reasons; naïve café owners gave 1,000,000.",
]
VOCAB_SIZE = 400
SAMPLES = [
    "Größe, schön, ÿ, À la carte, Þór, señor, ÷",
    "Ελληνικά, русский, العربية, हिन्दी, 日本語のテキスト, 한국어",
    "\tif x:\r\n\t\treturn  {'a': 1}   \n\n\n",
    "👩‍👩‍👧‍👦 \u200d e\u0301 \ufeff \u2028 \x00 \x7f",
    "",
    " ",
]

few = settings(max_examples=60, derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.load(official_path())


def official_path() -> Path:
    path = os.environ.get("DSV2_OFFICIAL_TOKENIZER")
    if not path:
        pytest.skip("DSV2_OFFICIAL_TOKENIZER does not name DeepSeek-V2's tokenizer.json")
    return Path(path)


def spec_of(tokenizer: Tokenizer, directory: Path) -> dict:
    tokenizer.save(directory)
    return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))


def with_added(tokenizer: Tokenizer, directory: Path, *contents: str) -> Tokenizer:
    """The tokenizer with more added tokens, not marked special, as some files have their markers."""
    spec = spec_of(tokenizer, directory)
    for offset, content in enumerate(contents):
        entry = {"content": content, "id": tokenizer.vocab_size + offset, "special": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        spec["added_tokens"].append(entry | flags)
    return Tokenizer(json.dumps(spec))


# Round trips


@few
@given(text=st.text())
def test_decode_of_encode_is_identity(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_come_back_as_they_were(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_round_trip_check_reaches_every_byte_of_utf8() -> None:
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set("".join(_ROUND_TRIP).encode()) == set(range(256)) - never_in_utf8


def test_batch_encodes_as_each_text_alone(small: Tokenizer) -> None:
    assert small.encode_batch(TEXTS + SAMPLES) == [small.encode(text) for text in TEXTS + SAMPLES]


def test_add_bos_puts_bos_first(small: Tokenizer) -> None:
    expected = [small.bos_id, *small.encode("fox")]
    assert small.encode("fox", add_bos=True) == small.encode_batch(["fox"], add_bos=True)[0] == expected


def test_token_bytes_concatenate_to_the_text(small: Tokenizer) -> None:
    text = "模型 naïve 😀"
    assert b"".join(map(small.token_bytes, small.encode(text))) == text.encode()


def test_decode_takes_numpy_ids(small: Tokenizer) -> None:
    assert small.decode(np.array(small.encode("the fox"), dtype=np.int64)) == "the fox"


def test_ids_past_the_vocabulary_decode_to_nothing(small: Tokenizer) -> None:
    assert small.decode([*small.encode("fox"), small.vocab_size, small.vocab_size + 1000]) == "fox"


def test_negative_id_is_refused(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="token id is -100, expected 0 or more"):
        small.decode([-100])


# Streams


@few
@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 5)), skip=st.booleans())
def test_stream_concatenates_to_decode_of_the_whole(small: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(small, skip_special_tokens=skip)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert streamed == small.decode(ids, skip_special_tokens=skip)


@few
@given(text=st.text())
def test_stream_pushes_are_prefixes_of_the_text(small: Tokenizer, text: str) -> None:
    stream, seen = StreamDecoder(small), ""
    for token_id in small.encode(text):
        seen += stream.push(token_id)
        assert text.startswith(seen)


def test_stream_holds_an_unfinished_character_back(small: Tokenizer) -> None:
    first, *rest = small.encode("😀")
    stream = StreamDecoder(small)
    assert [stream.push(first), *map(stream.push, rest)] == ["", *[""] * (len(rest) - 1), "😀"]


def test_flush_shows_an_unfinished_character_once(small: Tokenizer) -> None:
    stream = StreamDecoder(small)
    stream.push(small.encode("😀")[0])
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


# Control tokens


@pytest.mark.parametrize("token", [BOS_TOKEN, EOS_TOKEN])
def test_text_that_spells_a_control_token_stays_text(small: Tokenizer, token: str) -> None:
    ids = [*small.encode(token), *small.encode_batch([token])[0]]
    assert not {small.bos_id, small.eos_id} & set(ids)


def test_parse_special_turns_spellings_into_control_tokens(small: Tokenizer) -> None:
    expected = [small.bos_id, *small.encode("fox "), small.eos_id, *small.encode("\n")]
    assert small.encode(f"{BOS_TOKEN}fox {EOS_TOKEN}\n", parse_special=True) == expected


def test_decode_shows_special_tokens_on_request(small: Tokenizer) -> None:
    ids = small.encode("fox", add_bos=True)
    assert (small.decode(ids), small.decode(ids, skip_special_tokens=False)) == ("fox", f"{BOS_TOKEN}fox")


def test_unmarked_chat_markers_are_control_tokens(small: Tokenizer, tmp_path: Path) -> None:
    marked = with_added(small, tmp_path, "<｜User｜>")
    as_text, as_marker = marked.encode("<｜User｜>"), marked.encode("<｜User｜>", parse_special=True)
    assert small.vocab_size not in as_text and as_marker == [small.vocab_size]


def test_unmarked_chat_markers_are_decoded(small: Tokenizer, tmp_path: Path) -> None:
    marked = with_added(small, tmp_path, "<｜User｜>")
    assert marked.decode([small.vocab_size, marked.eos_id]) == "<｜User｜>"


def test_added_tokens_that_are_letters_stay_part_of_text(small: Tokenizer, tmp_path: Path) -> None:
    """The official file has 13 letters as added tokens; `tokenizers` itself decodes them to U+FFFD."""
    lettered = with_added(small, tmp_path, "üb")
    ids = lettered.encode("darüber")
    assert small.vocab_size in ids and lettered.decode(ids) == "darüber"


def test_longest_control_token_wins(small: Tokenizer, tmp_path: Path) -> None:
    marked = with_added(small, tmp_path, "<a>", "<a>>")
    assert marked.encode("<a>>", parse_special=True) == [small.vocab_size + 1]


def test_pickled_copy_keeps_control_tokens_as_text(small: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode(EOS_TOKEN + "fox") == small.encode(EOS_TOKEN + "fox")


# Training


def test_training_twice_writes_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Tokenizer.train(iter(TEXTS), VOCAB_SIZE).save(tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_trained_vocabulary_ends_with_bos_and_eos(small: Tokenizer) -> None:
    assert (small.vocab_size, small.bos_id, small.eos_id) == (VOCAB_SIZE, VOCAB_SIZE - 2, VOCAB_SIZE - 1)


def test_control_tokens_of_training_come_last_and_spelled_stay_text() -> None:
    trained = Tokenizer.train(TEXTS, VOCAB_SIZE, ("<|a|>", "<|b|>"))
    assert [trained.control_tokens[token] for token in ("<|a|>", "<|b|>")] == [VOCAB_SIZE - 2, VOCAB_SIZE - 1]
    assert (trained.bos_id, trained.eos_id) == (VOCAB_SIZE - 4, VOCAB_SIZE - 3)
    assert VOCAB_SIZE - 1 not in trained.encode("<|b|>")


def test_trained_vocabulary_has_every_byte(small: Tokenizer) -> None:
    assert {small.token_bytes(i) for i in range(256)} == {bytes([i]) for i in range(256)}


def test_digits_are_tokens_of_their_own(small: Tokenizer) -> None:
    assert [small.token_bytes(i) for i in small.encode("1984")] == [b"1", b"9", b"8", b"4"]


def test_few_texts_give_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["ab"], 1000).vocab_size == 256 + 1 + 2


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXTS, 257, "vocab_size is 257, expected at least 258"),
        ([], 300, "no training text"),
        ("one string", 300, "texts is one string"),
        (["good", b"bad"], 300, "training text 1 is of type bytes, expected str"),
    ],
)
def test_unusable_training_input_is_refused(texts: list, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(texts, vocab_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "text 0 is of type bytes, expected str"),
        (("a", "pair"), "text 0 is of type tuple, expected str"),
        ("fox \ud800", "text 0 has a lone surrogate at character 4"),
    ],
)
@pytest.mark.parametrize("parse_special", [False, True])
def test_unencodable_text_is_refused(small: Tokenizer, text: str, message: str, parse_special: bool) -> None:
    with pytest.raises(ValueError, match=message):
        small.encode(text, parse_special=parse_special)


def test_batch_names_the_unencodable_text(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="text 1 has a lone surrogate at character 0"):
        small.encode_batch(["fox", "\udfff"])


def test_batch_of_one_string_is_refused(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="texts is one string"):
        small.encode_batch("fox")


# Files


def test_saved_tokenizer_loads_the_same(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.fingerprint, loaded.encode(TEXTS[0])) == (small.fingerprint, small.encode(TEXTS[0]))


def test_fingerprint_depends_on_content_not_on_layout(small: Tokenizer, tmp_path: Path) -> None:
    spec = spec_of(small, tmp_path)
    reordered = dict(reversed(spec.items())) | {"truncation": TRUNCATION}
    laid_out = json.dumps(reordered, indent=3)
    assert Tokenizer(laid_out).fingerprint == small.fingerprint


def test_fingerprints_of_two_vocabularies_differ(small: Tokenizer) -> None:
    assert Tokenizer.train(TEXTS, VOCAB_SIZE - 1).fingerprint != small.fingerprint


def test_truncation_setting_of_the_file_is_ignored(small: Tokenizer, tmp_path: Path) -> None:
    spec = spec_of(small, tmp_path) | {"truncation": TRUNCATION}
    assert Tokenizer(json.dumps(spec)).encode(TEXTS[0]) == small.encode(TEXTS[0])


def test_a_file_loads_without_its_directory(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("not read", encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_id == small.bos_id


@pytest.mark.parametrize("as_object", [False, True])
def test_token_names_come_from_the_config(small: Tokenizer, tmp_path: Path, as_object: bool) -> None:
    with_added(small, tmp_path, "<s>", "</s>", "<pad>").save(tmp_path)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {key: {"content": name} if as_object else name for key, name in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert [loaded.bos_id, loaded.eos_id, loaded.pad_id] == [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]


def test_names_left_out_of_the_config_are_deepseeks(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}', encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS_TOKEN, EOS_TOKEN, EOS_TOKEN)


def test_template_file_wins_over_the_config(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}', encoding="utf-8")
    templates = [Tokenizer.load(tmp_path).chat_template]
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert [*templates, Tokenizer.load(tmp_path).chat_template] == ["config", "file"]


def test_saved_template_replaces_a_template_file(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("stale", encoding="utf-8")
    copy = pickle.loads(pickle.dumps(small))
    copy.chat_template = "{{ bos_token }}"
    copy.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == "{{ bos_token }}"


def test_save_leaves_nothing_but_its_two_files(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "new" / "directory")
    names = sorted(path.name for path in (tmp_path / "new" / "directory").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def test_interrupted_save_leaves_the_old_file(
    small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer_config.json").write_text("old", encoding="utf-8")

    def no_space(self: Path, *args: object, **kwargs: object) -> int:
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match="No space"):
        small.save(tmp_path)
    left = [(path.name, path.read_bytes()) for path in tmp_path.iterdir()]
    assert left == [("tokenizer_config.json", b"old")]


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_is_saved_and_gives_the_same_ids(small: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(TEXTS + SAMPLES)["input_ids"] == small.encode_batch(TEXTS + SAMPLES)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (small.bos_id, small.eos_id)


# Files that cannot be used


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json: No such file"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model": 3}', ""])
def test_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json of the `tokenizers`"):
        Tokenizer.load(tmp_path)


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .* expected a file of UTF-8 text"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ('{"bos_token": 3}', "bos_token is 3, expected a string"),
        ('{"eos_token": {"id": 1}}', "eos_token is {'id': 1}, expected a string"),
        ('{"chat_template": ["a"]}', "chat_template is .'a'., expected a string"),
        ('{"bos_token": "<bos>"}', "no bos token in the vocabulary; looked for '<bos>'"),
    ],
)
def test_unusable_config_is_refused(small: Tokenizer, tmp_path: Path, config: str, message: str) -> None:
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("kind", "place"), [("bos", 0), ("eos", 1)])
def test_vocabulary_without_bos_or_eos_says_what_was_looked_for(
    small: Tokenizer, tmp_path: Path, kind: str, place: int
) -> None:
    spec = spec_of(small, tmp_path)
    name = spec["added_tokens"].pop(place)["content"]
    with pytest.raises(ValueError, match=f"no {kind} token in the vocabulary; looked for '{name}'"):
        Tokenizer(json.dumps(spec))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    "damage",
    [
        {"decoder": METASPACE},
        {"pre_tokenizer": METASPACE, "decoder": METASPACE},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=["decoder", "pre_tokenizer", "normalizer"],
)
def test_failed_round_trip_names_file_and_string(small: Tokenizer, tmp_path: Path, damage: dict) -> None:
    spec = spec_of(small, tmp_path) | damage
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .* fails its round trip: .Hello.+ comes back"):
        Tokenizer.load(tmp_path)


# The official vocabulary


def test_official_ids(official: Tokenizer) -> None:
    assert (official.bos_id, official.eos_id, official.vocab_size) == (100000, 100001, 100015)


@pytest.mark.parametrize("text", [*TEXTS, *SAMPLES, "øöúÿõ÷ûýÀùÁþü"])
def test_official_vocabulary_gives_samples_back(official: Tokenizer, text: str) -> None:
    assert official.decode(official.encode(text)) == text


@few
@given(text=st.text())
def test_official_decode_of_encode_is_identity(official: Tokenizer, text: str) -> None:
    assert official.decode(official.encode(text)) == text


def test_official_vocabulary_splits_digits(official: Tokenizer) -> None:
    assert [official.token_bytes(i) for i in official.encode("3.14159")] == [bytes([c]) for c in b"3.14159"]


def test_official_spelling_of_eos_stays_text(official: Tokenizer) -> None:
    assert official.eos_id not in official.encode(EOS_TOKEN)


def test_our_pre_tokenizer_is_the_official_one() -> None:
    theirs = tokenizers.Tokenizer.from_file(str(official_path())).pre_tokenizer
    ours = _deepseek_pre_tokenizer()
    characters = [chr(point) for point in range(0, 0x20000, 11) if not 0xD800 <= point < 0xE000]
    texts = [*TEXTS, *SAMPLES, *(f"a{character}b" for character in characters)]
    different = [text for text in texts if theirs.pre_tokenize_str(text) != ours.pre_tokenize_str(text)]
    assert different == []
