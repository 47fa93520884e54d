"""`PrepareConfig`: how text becomes token shards, as a recipe (TOML) describes it. Read by `dsv2 data prepare`.

The paper discloses neither its filters nor its mixture, but that Chinese tokens are about 12% more than English ones
(section 3.1.1); each threshold names the publication that it comes from. This module opens no files but the recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv2.config import schema
from dsv2.config.run import read_recipe
from dsv2.config.schema import require

LANGUAGES = ("english", "chinese", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One kind of text: exactly one of `paths`, `dataset` and `corpus` says where it is."""

    name: str
    paths: tuple[str, ...] = ()
    """Files or folders: .txt, .md, .py, .jsonl, .jsonl.gz, .jsonl.zst, .parquet. A file is not divided."""
    dataset: str | None = None
    """What `datasets.load_dataset` takes: a hub id, or a local folder. Streamed, shard by shard."""
    dataset_config: str | None = None
    split: str = "train"
    corpus: Literal["english", "chinese", "code"] | None = None
    """Text that an installed package carries."""
    corpus_bytes: int = 2_000_000
    text_field: str = "text"
    """The key or column that holds the text."""
    language: Literal["auto", "english", "chinese", "code"] = "auto"
    """Which filters apply. auto: .py files are code, mostly Han letters are Chinese, anything else goes as English."""
    fim_rate: float = 0.0
    """Share of documents rearranged for filling in the middle; 0.5 in DeepSeek-Coder-V2 (16B)."""

    def __post_init__(self) -> None:
        where = f"sources.{self.name}"
        require(re.fullmatch(r"[\w][\w.-]*", self.name) is not None, f"sources.name={self.name!r} must be letters, _.-")
        given = [n for n in ("paths", "dataset", "corpus") if getattr(self, n)]
        require(
            len(given) == 1, f"{where} must have one of paths, dataset and corpus; got {', '.join(given) or 'none'}"
        )
        require(0 <= self.fim_rate <= 1, f"{where}.fim_rate={self.fim_rate} must be in [0, 1]")
        require(self.corpus_bytes > 0, f"{where}.corpus_bytes={self.corpus_bytes} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Quality filters. G: Gopher, arXiv 2112.11446, A1. C4: arXiv 1910.10683. F: FineWeb, arXiv 2406.17557.

    D: DeepSeek-Coder, arXiv 2401.14196, 2.1. A Chinese letter counts as half a word, and n-grams are three times as
    long: at twice, half of China's statutes repeat themselves too much, of books none at once.
    """

    enabled: bool = True
    malformed: Literal["reject", "error"] = "reject"
    """What a record that is not JSON, not UTF-8 or without a string as its text does: count it, or stop."""
    min_words: int = 50
    """G."""
    max_words: int = 100_000
    """G. Raise it for books."""
    min_word_length: float = 3.0
    """G, English only: mean letters a word."""
    max_word_length: float = 10.0
    """G, English only."""
    min_stop_words: int = 2
    """G, English only: distinct ones of the, be, to, of, and, that, have, with."""
    max_symbol_ratio: float = 0.1
    """G: hashes or ellipses a word."""
    min_alphabetic_words: float = 0.8
    """G, English; Chinese: letters among the characters, `min_letters_chinese`."""
    min_letters_chinese: float = 0.5
    """Our choice: letters among characters that are not blank."""
    max_bullet_lines: float = 0.9
    """G."""
    max_ellipsis_lines: float = 0.3
    """G."""
    min_finished_lines: float = 0.12
    """F: lines that end with a mark of punctuation."""
    max_repeated_lines: float = 0.3
    """G, also paragraphs: share that occurred before in the document."""
    max_repeated_line_letters: float = 0.2
    """G, also paragraphs: share of the characters in them."""
    max_top_ngram: tuple[float, ...] = (0.2, 0.18, 0.16)
    """G: share of the letters in the most frequent 2-, 3- and 4-gram."""
    max_repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """G: share of the letters in 5- to 10-grams that occurred before."""
    max_mean_line: float = 100.0
    """D, code only: characters."""
    max_line: int = 1000
    """D, code only: characters."""
    min_letters_code: float = 0.25
    """D, code only: share of the characters."""
    benchmarks: tuple[str, ...] = ()
    """Files of evaluation text (.jsonl: every string in it): a document that shares an n-gram with them is dropped."""
    benchmark_ngram: int = 10
    """D: words, for documents of every language. Shorter texts of a benchmark are not looked for."""

    def __post_init__(self) -> None:
        require(self.benchmark_ngram > 0, f"filters.benchmark_ngram={self.benchmark_ngram} must be positive")
        require(
            0 < self.min_words <= self.max_words,
            f"filters.min_words={self.min_words} must be in 1..max_words={self.max_words}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """minhash includes exact. Texts with a share J of their n-grams in common are found with 1 - (1 - J^rows)^bands.

    The defaults are FineWeb's (arXiv 2406.17557): 0.77 at J = 0.75, 0.92 at 0.8, 0.9996 at 0.9.
    """

    method: Literal["minhash", "exact", "none"] = "minhash"
    ngram: int = 5
    """Words, or Chinese letters."""
    bands: int = 14
    rows: int = 8

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows"):
            require(getattr(self, name) > 0, f"dedup.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """What share of the tokens each source or language gets. none: every document once."""

    by: Literal["none", "source", "language"] = "none"
    weights: dict[str, float] = field(default_factory=dict)
    """Of every source or language that is there; only their ratios count."""
    tokens: int | None = None
    """In all; None: as many as there are before any has to be repeated."""
    max_epochs: float = 4.0
    """How often a document may be repeated: up to 4 times costs little (arXiv 2305.16264)."""

    def __post_init__(self) -> None:
        require(
            (self.by == "none") == (not self.weights) and (self.by != "none" or self.tokens is None),
            f"mixture.weights and mixture.tokens need mixture.by = 'source' or 'language', and that needs weights; "
            f"got by={self.by!r}, weights={self.weights}, tokens={self.tokens}",
        )
        for name, weight in self.weights.items():
            require(0 < weight < math.inf, f"mixture.weights.{name}={weight} must be positive and finite")
        require(self.tokens is None or self.tokens > 0, f"mixture.tokens={self.tokens} must be positive")
        require(self.max_epochs >= 1, f"mixture.max_epochs={self.max_epochs} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """Everything that decides the shards, but the files themselves."""

    tokenizer: str
    """Directory or tokenizer.json."""
    sources: tuple[SourceConfig, ...]
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    mixture: MixtureConfig = MixtureConfig()
    held_out_fraction: float = 0.0
    """Share of the documents kept away from training, chosen by a hash of the text: growth moves none."""
    part_bytes: int = 2**26
    """Small files are worked on together up to this size; a part is what a restart repeats."""
    shard_tokens: int = 2**26
    seed: int = 0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(bool(names), "sources must name at least one source")
        require(len(set(names)) == len(names), f"sources have the names {', '.join(names)}: expected distinct ones")
        require(0 <= self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must be in [0, 1)")
        for name in ("part_bytes", "shard_tokens"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        known = {"source": names, "language": LANGUAGES}.get(self.mixture.by, ())
        for name in self.mixture.weights:
            if name not in known:
                raise schema.unknown_key_error(name, known, "mixture.weights")

    def to_dict(self) -> dict[str, Any]:
        return schema.to_dict(self)


def load_prepare(recipe: str | Path, overrides: Sequence[str] = ()) -> PrepareConfig:
    """Read a recipe. Raises ValueError for a missing file, invalid TOML, and unknown, missing or mistyped keys."""
    return schema.from_dict(PrepareConfig, read_recipe(recipe, overrides), str(recipe))
