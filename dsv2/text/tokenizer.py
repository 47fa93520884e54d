"""Byte-level BPE: the vocabulary that DeepSeek-V2 shares with DeepSeek 67B, and small ones of the same kind.
Paper: section 3.1.1 ("BBPE ... vocabulary size of 100K").
Does not: download, pad or truncate, know a model's embedding rows, or lay out conversations (chat.py does).
"""

import codecs
import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsv2.files import write_text

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"

# The five splits of DeepSeek's tokenizer.json, in its order. Its list of 200 letter ranges is the class of
# cased letters, written here by name. ":-~" covers ASCII letters too, harmlessly: they are already apart.
_SPLITS = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
)

# Together these reach every byte that UTF-8 can hold. They avoid 13 Latin-1 letters that are added tokens of
# the official file (see _TokenBytes): the library's own decoder, which is checked too, breaks them.
_ROUND_TRIP = (
    "Hello, world! The quick brown fox's nap isn't over.",
    "深度求索：混合专家模型，多头潜在注意力。",
    "def f(x):\n    if x:\n\t\treturn x  # done\r\n\n\n",
    "0123456789 3.14159 1,000,000",
    "😀 👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 n\u0303 \u0915\u094d\u0937\u093f",
    "  before and after  ",
    "\n" * 20 + "\t" * 20 + " " * 100 + "x" + " " * 100,
    "".join(map(chr, range(128))),
    "©é" + "".join(map(chr, range(0x100, 0x800, 31))),
    "".join(map(chr, (*range(0x800, 0xD800, 997), *range(0xE000, 0x10000, 997)))),
    "".join(map(chr, range(0x10000, 0x110000, 40009))),
)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's bijection between 256 printable characters and bytes: printable Latin-1 stands for itself."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """Text <-> token ids with one `tokenizer.json`, read by `tokenizers` itself.

    Never by `AutoTokenizer`: the official files name a Llama class, for which transformers 5 installs a
    Metaspace pre-tokenizer that drops the spaces of this vocabulary. Each instance passed a round-trip check.

    A *control token* is an added token that is marked special, is bos, eos or pad, or is spelled `<...>`
    (chat, fill-in-the-middle and tool markers, which some files leave unmarked). Text never turns into one
    unless `encode` is told to parse it, so that a prompt cannot forge the end of a turn. `decode` skips only
    bos, eos, pad and those marked special, as other programs do.

    Instances can be pickled and shared between threads. `chat_template` (jinja text or None) may be assigned.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        """Builds from the text of a tokenizer.json; `source` names it in errors. See `load` for the rest."""
        self._json, self._source = tokenizer_json, source
        self._fingerprint: str | None = None
        try:
            inner = _parse(tokenizer_json)
            self.bos_token, self.bos_id = _find(inner, bos_token, BOS_TOKEN, "bos")
            self.eos_token, self.eos_id = _find(inner, eos_token, EOS_TOKEN, "eos")
            self.pad_token, self.pad_id = _find(inner, pad_token, self.eos_token, "pad")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        self.chat_template = chat_template
        self.vocab_size: int = max(inner.get_vocab().values()) + 1

        named = {self.bos_token: self.bos_id, self.eos_token: self.eos_id, self.pad_token: self.pad_id}
        added = inner.get_added_tokens_decoder()
        marked = {token.content: i for i, token in added.items() if token.special}
        shaped = {token.content: i for i, token in added.items() if re.fullmatch(r"<\S+>", token.content)}
        self._special_ids = frozenset((named | marked).values())
        self.control_tokens: dict[str, int] = named | marked | shaped
        # Longest first: where one control token begins another, the longer one is meant.
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        self._inner = _shielded(inner, tokenizer_json, self.control_tokens)
        self._token_bytes = _TokenBytes(self._inner)
        self._check_round_trip()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, or a directory that holds one.

        Of a directory it also reads `tokenizer_config.json` (bos, eos and pad, each a string or an object
        with "content"; the chat template) and `chat_template.jinja`, which wins. Names that are not given are
        DeepSeek's spellings; pad falls back to eos. Padding and truncation settings of the file are ignored.
        Raises ValueError: file missing or not a tokenizer.json, bos or eos not found, a failed round trip.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(_read(path), source=str(path))
        file = path / "tokenizer.json"
        return cls(_read(file), source=str(file), **_read_settings(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str] = ()) -> "Tokenizer":
        """Trains byte-level BPE with DeepSeek's pre-tokenizer; the same texts give the same file.

        Ids: 256 bytes, merges, then bos, eos and `control_tokens` last, as in the official vocabulary. Texts that
        hold too few distinct pairs for `vocab_size` give a smaller vocabulary. Raises ValueError for a vocab_size
        below 258 and the control tokens, no text, or a text that is not a string.
        """
        special_tokens = [BOS_TOKEN, EOS_TOKEN, *control_tokens]
        if vocab_size < (least := 256 + len(special_tokens)):
            raise ValueError(f"vocab_size is {vocab_size}, expected at least {least} (256 bytes, bos and eos)")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = _deepseek_pre_tokenizer()
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        inner.train_from_iterator(_training_texts(texts), trainer)
        inner.add_special_tokens(special_tokens)
        return cls(inner.to_str(), source="trained tokenizer")

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, each complete or absent, in HF's form.

        A `chat_template.jinja` left there by another tokenizer is removed: it would win over the one written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config: dict[str, Any] = kind | self._names
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_text(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        write_text(directory / "tokenizer.json", self._canonical_json)

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, after bos if `add_bos`.

        `text` that spells a control token stays text, unless `parse_special`: then it becomes that token.
        Only parse text that you wrote. Raises ValueError for what is not a string or holds a lone surrogate.
        """
        prefix = [self.bos_id] if add_bos else []
        return prefix + self.encode_split(self.split_special(text) if parse_special else [text])

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = False) -> list[list[int]]:
        """`encode` of each text, in order, on all cores. Control tokens stay text."""
        _check_texts(texts)
        prefix = [self.bos_id] if add_bos else []
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [prefix + encoding.ids for encoding in encodings]

    def split_special(self, text: str) -> list[str]:
        """Cuts `text` at its control tokens: [text, control, text, ..., text]."""
        _check_texts([text])
        return self._control_pattern.split(text)

    def encode_split(self, pieces: Sequence[str]) -> list[int]:
        """Ids of pieces laid out as by `split_special`: at even places is text, whatever it spells."""
        _check_texts(pieces[::2])
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self.control_tokens[piece])
            else:
                ids += self._inner.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids` (ints, or numpy or torch integers); U+FFFD where the bytes are not UTF-8.

        Ids past the vocabulary (padded embedding rows) decode to nothing; negative ones raise ValueError.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        kept = (self._token_bytes[i] for i in map(index, ids) if i not in skipped)
        return b"".join(kept).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token adds to the text; alone they need not be valid UTF-8."""
        return self._token_bytes[index(token_id)]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer.json with sorted keys, no spaces: which vocabulary made some ids."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._canonical_json.encode()).hexdigest()
        return self._fingerprint

    @property
    def _canonical_json(self) -> str:
        # From the file's own text: what `tokenizers` would write changes with its version.
        spec = json.loads(self._json) | {"padding": None, "truncation": None}
        return json.dumps(spec, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @property
    def _names(self) -> dict[str, str]:
        return {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}

    def _check_round_trip(self) -> None:
        # `decode` does without the library's decoder, but other programs use it on the file that we save.
        # One text at a time: a batch would start the library's thread pool, which a fork does not survive.
        for text in (*_ROUND_TRIP, " ".join(self.control_tokens)):
            ids = self.encode(text)
            for got in (self.decode(ids), self._inner.decode(ids, skip_special_tokens=False)):
                if got != text:
                    raise ValueError(
                        f"{self._source}: a tokenizer that fails its round trip: {text[:60]!r} comes back as "
                        f"{got[:60]!r}; expected byte-level BPE with its original pre-tokenizer and decoder"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # Rebuilt from its text: pickling the inner object would lose that it keeps control tokens as text.
        texts = {"tokenizer_json": self._json, "chat_template": self.chat_template, "source": self._source}
        return texts | self._names

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class StreamDecoder:
    """Text of ids that arrive one by one; the pushes and the flush concatenate to `decode` of all ids.

    A character whose bytes have not all arrived is held back, so no push shows half of one.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes final, perhaps "". U+FFFD only for bytes that can't become UTF-8."""
        if index(token_id) in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the text: U+FFFD if a character stayed unfinished, else "". Then ready for a new text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, filled as ids are met.

    An added token is matched in raw text, so it stands for its own spelling. `tokenizers` decodes it as
    byte-level characters instead, which breaks 13 letters of the official vocabulary: "ü" is the added token
    100014 and would come back as the byte 0xFC, so as U+FFFD.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._inner = inner
        self._added = inner.get_added_tokens_decoder()

    def __missing__(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id is {token_id}, expected 0 or more")
        added = self._added.get(token_id)
        spelled = self._inner.id_to_token(token_id) or ""
        self[token_id] = added.content.encode() if added else _bytes_of(spelled)
        return self[token_id]


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()  # not spelled in the byte alphabet: itself, as the library's decoder has it


def _parse(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"not a tokenizer.json of the `tokenizers` library: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    return inner


def _shielded(inner: tokenizers.Tokenizer, spec_json: str, control: Container[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, to which control tokens are text: `encode_split` puts them in by id."""
    added = inner.get_added_tokens_decoder().values()
    if any(token.content in control and not token.special for token in added):
        # The library can leave a token alone only if it is marked special.
        spec = json.loads(spec_json)
        for token in spec["added_tokens"]:
            token["special"] |= token["content"] in control
        inner = _parse(json.dumps(spec))
    inner.encode_special_tokens = True
    return inner


def _find(inner: tokenizers.Tokenizer, named: str | None, default: str, kind: str) -> tuple[str, int]:
    name = default if named is None else named
    token_id = inner.token_to_id(name)
    if token_id is None:
        looked = f"looked for {name!r} (DeepSeek's spelling unless tokenizer_config.json names another)"
        raise ValueError(f"no {kind} token in the vocabulary; {looked}")
    return name, token_id


def _deepseek_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, digits, to_bytes])


def _training_texts(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one string, expected several: a list or an iterator of strings")
    place = -1
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"training text {place} is of type {type(text).__name__}, expected str")
        yield text
    if place < 0:
        raise ValueError("no training text: expected at least one string")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError("texts is one string, expected a list of strings")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {place} is of type {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {place} has a lone surrogate at character {error.start}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}; expected a file of UTF-8 text") from error


def _read_settings(directory: Path) -> dict[str, str | None]:
    settings: dict[str, str | None] = {}
    path = directory / "tokenizer_config.json"
    if path.exists():
        config = _read_object(path)
        for key in ("bos_token", "eos_token", "pad_token", "chat_template"):
            entry = config.get(key)
            settings[key] = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(settings[key], str) and entry is not None:
                raise ValueError(f'{path}: {key} is {entry!r}, expected a string or {{"content": string}}')
    if (directory / "chat_template.jinja").exists():
        settings["chat_template"] = _read(directory / "chat_template.jinja")
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config
