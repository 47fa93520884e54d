"""Token shards: documents tokenised once, written complete or not at all, and memory-mapped ever after.

The paper names the tokenizer (section 3.1.1) and no storage; the format is described by `Manifest`.
This room does not choose, clean or shuffle documents.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dsv2.data.documents import Document
from dsv2.files import replacing_directory

_VERSION = 1
_MANIFEST = "manifest.json"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
# First token in the stream of all shards, tokens with bos and eos, UTF-8 bytes of the text, source index.
_FIELDS = ("start", "tokens", "bytes", "source")
_DOCUMENT = np.dtype([(name, "<i8") for name in _FIELDS])


class Tokenizer(Protocol):
    """What `write_shards` asks of a tokenizer. `encode_batch` adds neither bos nor eos."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(self, texts: list[str], /) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file beside the manifest. `num_items` counts tokens in a shard, documents in the document table."""

    file: str
    num_items: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SourceTotals:
    """What one source contributed. Tokens include bos and eos; bytes are UTF-8 of the texts."""

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json`. Shards are raw little-endian tokens, document after document, `[bos] text [eos]`.

    `documents` is a numpy file of int64 records: start, tokens, bytes, source (an index into `sources`).
    """

    version: int
    dtype: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    sources: tuple[SourceTotals, ...]
    shards: tuple[StoredFile, ...]
    documents: StoredFile

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_items for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return self.documents.num_items

    @staticmethod
    def read(path: Path) -> Manifest:
        """Raises ValueError for a file that is missing, of another version, or not a manifest."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a folder made by write_shards")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["version"] != _VERSION or fields["dtype"] not in _DTYPES:
                raise ValueError(
                    f"format version {fields['version']!r} with {fields['dtype']!r} tokens; "
                    f"expected version {_VERSION} with one of {', '.join(_DTYPES)}"
                )
            fields["sources"] = tuple(SourceTotals(**source) for source in fields["sources"])
            fields["shards"] = tuple(StoredFile(**shard) for shard in fields["shards"])
            fields["documents"] = StoredFile(**fields["documents"])
            return Manifest(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a manifest of token shards: {error!r}") from error


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    shard_tokens: int = 2**26,
    batch_documents: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Tokenise `documents` into the new folder `out_dir`, which appears complete at the end or not at all.

    Args:
        shard_tokens: a shard is closed before it would exceed this; a longer document gets a bigger shard.
        batch_documents: documents handed to the tokenizer at a time.
        progress: called after each batch with the number of documents stored so far.

    Raises:
        ValueError: for an `out_dir` that is not empty, no documents, or token ids outside the vocabulary.
    """
    if shard_tokens < 1 or batch_documents < 1:
        raise ValueError(f"expected at least 1, got {shard_tokens=} and {batch_documents=}")
    with replacing_directory(Path(out_dir).resolve()) as folder:
        writer = ShardWriter(folder, tokenizer, shard_tokens)
        stream = iter(documents)
        while batch := list(itertools.islice(stream, batch_documents)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                tokens = framed(document.id, ids, tokenizer)
                writer.add(document.source, len(document.text.encode()), tokens)
            if progress is not None:
                progress(writer.num_documents)
        if not writer.num_documents:
            raise ValueError(f"no documents to write to {out_dir}")
        return writer.finish()


def framed(document_id: str, ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """`[bos] ids [eos]`, int64. Raises ValueError, naming the document, for ids outside the vocabulary."""
    tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=np.int64)
    if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"document {document_id!r}: token ids from {tokens.min()} to {tokens.max()}; "
            f"expected 0 to {tokenizer.vocab_size - 1}"
        )
    return tokens


class ShardWriter:
    """Stores documents in the folder given; only the open shard and the document table are held in memory."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self._shard_bytes = shard_tokens * _DTYPES[self._dtype].itemsize
        self._open_shard = bytearray()
        self._shards: list[StoredFile] = []
        self._sources: dict[str, int] = {}
        self._num_tokens = 0
        # One record after another, _FIELDS each: a tenth of what tuples would take.
        self._fields = array("q")

    @property
    def num_documents(self) -> int:
        return len(self._fields) // len(_FIELDS)

    def add(self, source: str, num_bytes: int, tokens: np.ndarray) -> None:
        """Store a document: the UTF-8 bytes of its text, its tokens with bos and eos as `framed` makes them."""
        data = tokens.astype(_DTYPES[self._dtype]).tobytes()
        if self._open_shard and len(self._open_shard) + len(data) > self._shard_bytes:
            self._close_shard()
        self._open_shard += data
        source_idx = self._sources.setdefault(source, len(self._sources))
        self._fields.extend((self._num_tokens, len(tokens), num_bytes, source_idx))
        self._num_tokens += len(tokens)

    def _close_shard(self) -> None:
        num_tokens = len(self._open_shard) // _DTYPES[self._dtype].itemsize
        name = f"shard-{len(self._shards):05d}.bin"
        self._shards.append(_store(self._folder / name, self._open_shard, num_tokens))
        self._open_shard = bytearray()

    def finish(self) -> Manifest:
        """Write the open shard, the document table and, last, the manifest."""
        if self._open_shard:
            self._close_shard()
        table = np.empty(self.num_documents, _DOCUMENT)
        for i, name in enumerate(_FIELDS):
            table[name] = self._fields[i :: len(_FIELDS)]
        file = io.BytesIO()
        np.save(file, table)
        manifest = Manifest(
            version=_VERSION,
            dtype=self._dtype,
            fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            sources=tuple(_totals(name, table[table["source"] == i]) for name, i in self._sources.items()),
            shards=tuple(self._shards),
            documents=_store(self._folder / "documents.npy", file.getbuffer(), len(table)),
        )
        (self._folder / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        return manifest


def _store(path: Path, data: bytearray | memoryview, num_items: int) -> StoredFile:
    path.write_bytes(data)
    return StoredFile(path.name, num_items, len(data), hashlib.sha256(data).hexdigest())


def _totals(name: str, rows: np.ndarray) -> SourceTotals:
    return SourceTotals(name, len(rows), int(rows["tokens"].sum()), int(rows["bytes"].sum()))


class TokenShards:
    """All tokens of a folder made by `write_shards` as one stream, read through memory maps.

    `document_starts` [num_documents] int64, ascending from 0, says where documents begin in the stream.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`, which checks the files first."""
        self.directory = directory
        self.manifest = manifest
        dtype = _DTYPES[manifest.dtype]
        self._shards = [np.asarray(np.memmap(directory / s.file, dtype, "r")) for s in manifest.shards]
        self._shard_starts = list(itertools.accumulate(map(len, self._shards), initial=0))
        self._documents: np.ndarray = np.load(directory / manifest.documents.file, mmap_mode="r")
        self.document_starts = np.ascontiguousarray(self._documents["start"], dtype=np.int64)

    @staticmethod
    def open(directory: str | Path) -> TokenShards:
        """Raises ValueError, naming the file, for a manifest or file that is missing or of the wrong size."""
        directory = Path(directory)
        manifest = Manifest.read(directory / _MANIFEST)
        for stored in (*manifest.shards, manifest.documents):
            path = directory / stored.file
            if not path.is_file():
                raise ValueError(f"{path}: missing; the manifest lists it with {stored.num_bytes} bytes")
            num_bytes = path.stat().st_size
            if num_bytes != stored.num_bytes:
                raise ValueError(f"{path}: {num_bytes} bytes; the manifest expects {stored.num_bytes}")
        return TokenShards(directory, manifest)

    @property
    def num_tokens(self) -> int:
        return self._shard_starts[-1]

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of the stream, [stop - start] int64, a copy; shard borders do not show.

        Raises ValueError unless 0 <= start <= stop <= num_tokens.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens({start}, {stop}) is not a part of the {self.num_tokens} tokens")
        out = np.empty(stop - start, np.int64)
        shard_idx = bisect_right(self._shard_starts, start) - 1
        num_done = 0
        while num_done < len(out):
            offset = start + num_done - self._shard_starts[shard_idx]
            piece = self._shards[shard_idx][offset : offset + len(out) - num_done]
            out[num_done : num_done + len(piece)] = piece
            num_done += len(piece)
            shard_idx += 1
        return out

    def document(self, document_idx: int) -> tuple[str, int, np.ndarray]:
        """One document: (name of its source, UTF-8 bytes of its text, tokens [n] int64 with bos and eos)."""
        start, num_tokens, num_bytes, source_idx = self._documents[document_idx].item()
        return self.manifest.sources[source_idx].name, num_bytes, self.tokens(start, start + num_tokens)

    def documents(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Each document, as `document` gives it."""
        return map(self.document, range(len(self._documents)))

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError when the shards were made with another tokenizer: ids would mean other text."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.directory} was made with tokenizer {self.fingerprint}, not with {fingerprint}: "
                "use that tokenizer or write the shards again"
            )

    def verify(self) -> None:
        """Read every file and compare checksums. Raises ValueError naming the first file that differs."""
        for stored in (*self.manifest.shards, self.manifest.documents):
            path = self.directory / stored.file
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != stored.sha256:
                raise ValueError(f"{path}: sha256 {found}; the manifest expects {stored.sha256}")
