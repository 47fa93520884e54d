"""The parallel half of `dsv2 data prepare`: parts of sources are read, filtered, digested and tokenised, each alone.

The paper's section 3.1.1 names the tokenizer. A part's folder is complete or absent, and its name follows from all that
decides its content: a restart, another machine or another mixture finds it done. This room compares no documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv2.config.data import LANGUAGES, PrepareConfig, SourceConfig
from dsv2.data.dedup import MinHash, text_digest
from dsv2.data.documents import Document, TextFile, corpus, document_of, list_files, read_file, readable
from dsv2.data.filters import benchmark_ngrams, language_of, rejection
from dsv2.data.fim import FimCapableTokenizer, FimTokenizer
from dsv2.data.formats import dataset_rows, dataset_shards
from dsv2.data.ngrams import split_words, word_hashes
from dsv2.data.shards import ShardWriter, Tokenizer, TokenShards, framed
from dsv2.files import replacing_directory, write_json

# Raised when the same settings make other parts.
_VERSION = 1
_SHARD_TOKENS = 2**24
_BATCH_DOCUMENTS = 64
_MAX_EXAMPLES = 3
_EXAMPLE_LETTERS = 160


@dataclass(frozen=True, slots=True)
class Part:
    """Some files of a source, or one shard of a dataset, or a corpus."""

    source: SourceConfig
    index: int
    files: tuple[TextFile, ...] = ()
    num_shards: int = 0

    def documents(self, on_malformed: Callable[[str], object] | None) -> Iterator[Document]:
        """In order; of `on_malformed` see `readable`."""
        source = self.source
        if source.corpus is not None:
            yield from corpus(source.corpus, source.corpus_bytes)
        elif source.dataset is not None:
            yield from readable(self._dataset_records(source.dataset), on_malformed)
        else:
            for file in self.files:
                yield from read_file(file, source.text_field, on_malformed)

    def _dataset_records(self, dataset: str) -> Iterator[Callable[[], Document]]:
        source, name = self.source, f"{dataset}/{self.source.split}/{self.index}"
        file = TextFile(Path(dataset), name, source.name, source.name)
        records = dataset_rows(dataset, source.dataset_config, source.split, self.index, self.num_shards)
        for number, row in enumerate(records, start=1):
            where = f"{name}:{number}"
            yield partial(document_of, row, where, where, file, source.text_field)


def list_parts(config: PrepareConfig) -> list[Part]:
    """The parts of all sources, in order. Raises ValueError for a source that is not there."""
    return [part for source in config.sources for part in _parts_of(source, config.part_bytes)]


def _parts_of(source: SourceConfig, part_bytes: int) -> Iterator[Part]:
    if source.corpus is not None:
        yield Part(source, 0)
    elif source.dataset is not None:
        num_shards = dataset_shards(source.dataset, source.dataset_config, source.split)
        yield from (Part(source, shard, num_shards=num_shards) for shard in range(num_shards))
    else:
        files = list_files(source.paths, source.name)
        ends = itertools.accumulate(file.path.stat().st_size for file in files)
        groups = itertools.groupby(zip(ends, files, strict=True), key=lambda pair: (pair[0] - 1) // part_bytes)
        for index, (_, members) in enumerate(groups):
            yield Part(source, index, tuple(file for _, file in members))


class Preparation:
    """Makes the parts of `config` in the folder `work`. Can be pickled, for processes.

    A callable of (data, rank, world_size) that calls `run_share` is a step of datatrove's executors.
    """

    def __init__(self, config: PrepareConfig, tokenizer: FimCapableTokenizer, work: str | Path) -> None:
        """Raises ValueError for sources and benchmarks that are not there, and for FIM without its control tokens."""
        self.config, self.tokenizer, self.work = config, tokenizer, Path(work)
        self.parts = list_parts(config)
        filters = config.filters
        self._benchmarks = benchmark_ngrams(filters.benchmarks, filters.benchmark_ngram)
        dedup = config.dedup
        self._min_hash = MinHash(dedup, config.seed) if dedup.method == "minhash" else None
        self.row_dtype = row_dtype(dedup.bands if dedup.method == "minhash" else 0)
        for source in config.sources:
            self._tokenizer_of(source)
        self.folders = [self._folder(part) for part in self.parts]

    def _folder(self, part: Part) -> Path:
        """Where the part is or will be."""
        filters = asdict(self.config.filters) | {"benchmarks": hashlib.sha256(self._benchmarks.data).hexdigest()}
        dedup = asdict(self.config.dedup) | {"seed": self.config.seed}
        files = [(file.id, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in part.files]
        source = asdict(replace(part.source, paths=("",) if part.files else ()))
        key = [_VERSION, source, part.index, part.num_shards, files, filters, dedup, self.tokenizer.fingerprint]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.work / f"{part.source.name}-{part.index:05d}-{digest[:16]}"

    def missing(self) -> list[Path]:
        """The folders of the parts that are not done."""
        done = {path.name for path in self.work.iterdir()} if self.work.exists() else set()
        return [folder for folder in self.folders if folder.name not in done]

    def run_share(self, rank: int = 0, world_size: int = 1, on_part: Callable[[], object] = lambda: None) -> None:
        """Make those of every `world_size`-th part, from the `rank`-th, that are not done.

        Raises ValueError for records that cannot be read, as `config.filters.malformed` says; names file and line.
        """
        parent = multiprocessing.parent_process()
        shares = zip(self.parts[rank::world_size], self.folders[rank::world_size], strict=True)
        for part, folder in shares:
            if parent is not None and not parent.is_alive():
                return  # nobody waits any more
            if not folder.exists():
                with replacing_directory(folder) as unfinished:
                    self._make(part, unfinished)
            on_part()

    def _make(self, part: Part, folder: Path) -> None:
        (folder / "tokens").mkdir()
        tokenizer = self._tokenizer_of(part.source)
        writer = ShardWriter(folder / "tokens", tokenizer, _SHARD_TOKENS)
        summary = _Summary()
        kept = self._kept(part, summary)
        with (folder / "rows.bin").open("wb") as table:
            while batch := list(itertools.islice(kept, _BATCH_DOCUMENTS)):
                encoded = tokenizer.encode_batch([document.text for document, _ in batch])
                for (document, row), ids in zip(batch, encoded, strict=True):
                    tokens = framed(document.id, ids, tokenizer)
                    row["tokens"], row["bytes"] = len(tokens), len(document.text.encode())
                    writer.add(part.source.name, int(row["bytes"]), tokens)
                    table.write(row.tobytes())
        writer.finish()
        write_json(folder / "summary.json", summary.to_dict())

    def _kept(self, part: Part, summary: _Summary) -> Iterator[tuple[Document, np.ndarray]]:
        """Each document that passes the filters, and its row, without what only its tokens tell."""
        filters = self.config.filters
        on_malformed = summary.add_malformed if filters.malformed == "reject" else None
        for document in part.documents(on_malformed):
            language = language_of(document, part.source.language)
            words = split_words(document.text)
            hashes = word_hashes(words)
            reason = None
            if filters.enabled:
                reason = rejection(document.text, words, hashes, language, filters, self._benchmarks)
            summary.add(document, language, reason)
            if reason is None:
                row = np.zeros((), self.row_dtype)
                row["digest"], row["language"] = text_digest(document.text), LANGUAGES.index(language)
                if self._min_hash is not None:
                    row["bands"] = self._min_hash.bands(hashes)
                yield document, row

    def _tokenizer_of(self, source: SourceConfig) -> Tokenizer:
        return FimTokenizer(self.tokenizer, source.fim_rate) if source.fim_rate else self.tokenizer


def row_dtype(num_bands: int) -> np.dtype:
    """What is kept of a document beside its tokens."""
    numbers = [("digest", "<u8", (2,)), ("bands", "<u8", (num_bands,)), ("tokens", "<i8"), ("bytes", "<i8")]
    return np.dtype([*numbers, ("language", "u1")])


class _Summary:
    """Counts of documents and bytes by language and outcome, and some examples of what was dropped."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._examples: dict[str, list[dict[str, str]]] = {}

    def add(self, document: Document, language: str, reason: str | None) -> None:
        self._count(language, reason or "kept", len(document.text.encode()))
        if reason is not None:
            self._add_example(reason, document.id, document.text)

    def add_malformed(self, fault: str) -> None:
        self._count("unknown", "malformed", 0)
        self._add_example("malformed", fault, "")

    def _count(self, language: str, outcome: str, num_bytes: int) -> None:
        counts = self._counts.setdefault((language, outcome), [0, 0])
        counts[0] += 1
        counts[1] += num_bytes

    def _add_example(self, reason: str, document_id: str, text: str) -> None:
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            # File names that are not UTF-8 come as lone surrogates, which JSON's file cannot hold.
            name = document_id.encode(errors="replace").decode()
            examples.append({"id": name, "text": text.strip()[:_EXAMPLE_LETTERS]})

    def to_dict(self) -> dict[str, Any]:
        counts = [
            {"language": language, "outcome": outcome, "documents": num_documents, "bytes": num_bytes}
            for (language, outcome), (num_documents, num_bytes) in sorted(self._counts.items())
        ]
        return {"counts": counts, "examples": self._examples}


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """What `Preparation` left in a part's folder: documents in order, `rows[i]` is what is known of the i-th."""

    tokens: TokenShards
    rows: np.ndarray
    summary: dict[str, Any]

    @staticmethod
    def open(folder: Path, dtype: np.dtype) -> FinishedPart:
        """Raises ValueError, naming the file, for one that is missing or of the wrong size."""
        tokens = TokenShards.open(folder / "tokens")
        path, num_rows = folder / "rows.bin", tokens.manifest.num_documents
        if not path.is_file() or path.stat().st_size != num_rows * dtype.itemsize:
            raise ValueError(f"{path}: expected {num_rows * dtype.itemsize} bytes; delete {folder} to make it again")
        rows = np.memmap(path, dtype, "r") if num_rows else np.empty(0, dtype)
        return FinishedPart(tokens, rows, json.loads((folder / "summary.json").read_text(encoding="utf-8")))
