"""Claims about token shards: what is written is read back, complete or refused.

The tokenizer is a byte tokenizer, so that every expected token can be seen in the text.
This room does not test packing.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv2.data import Document, TokenShards, write_shards

_DOCUMENTS = [Document(f"{i}", "odd" if i % 2 else "even", "é中x"[: i % 4] * (i + 1)) for i in range(11)]


class _ByteTokenizer:
    def __init__(self, vocab_size: int = 258, fingerprint: str = "bytes-1") -> None:
        self.bos_id, self.eos_id = vocab_size - 2, vocab_size - 1
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.batch_sizes: list[int] = []

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.batch_sizes.append(len(texts))
        return [list(text.encode()) for text in texts]


def _expected(documents: list[Document], tokenizer: _ByteTokenizer) -> list[list[int]]:
    return [[tokenizer.bos_id, *document.text.encode(), tokenizer.eos_id] for document in documents]


@pytest.fixture
def shards_dir(tmp_path) -> Path:
    """Several shards, one of them a single document larger than shard_tokens."""
    write_shards(_DOCUMENTS, _ByteTokenizer(), tmp_path / "shards", shard_tokens=16, batch_documents=4)
    return tmp_path / "shards"


@pytest.mark.parametrize("shard_tokens", [1, 16, 40, 10**6])
@pytest.mark.parametrize("vocab_size", [258, 65_536, 65_537])
def test_documents_read_back_are_the_documents_written(tmp_path, shard_tokens, vocab_size):
    tokenizer = _ByteTokenizer(vocab_size)
    write_shards(_DOCUMENTS, tokenizer, tmp_path / "out", shard_tokens=shard_tokens, batch_documents=3)
    found = TokenShards.open(tmp_path / "out").documents()
    assert [(source, num_bytes, tokens.tolist()) for source, num_bytes, tokens in found] == [
        (document.source, len(document.text.encode()), tokens)
        for document, tokens in zip(_DOCUMENTS, _expected(_DOCUMENTS, tokenizer), strict=True)
    ]


def test_every_part_of_the_stream_reads_across_shard_borders(shards_dir):
    shards = TokenShards.open(shards_dir)
    stream = sum(_expected(_DOCUMENTS, _ByteTokenizer()), [])
    assert shards.num_tokens == len(stream)
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1, 7):
            assert shards.tokens(start, stop).tolist() == stream[start:stop]


def test_tokens_are_int64_and_free_to_write(shards_dir):
    tokens = TokenShards.open(shards_dir).tokens(0, 5)
    assert tokens.dtype == np.int64
    tokens[:] = 0
    assert TokenShards.open(shards_dir).tokens(0, 1)[0] == 256


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**6)])
def test_part_outside_the_stream_is_refused(shards_dir, start, stop):
    with pytest.raises(ValueError, match=f"tokens\\({start}, {stop}\\)"):
        TokenShards.open(shards_dir).tokens(start, stop)


def test_document_starts_are_the_places_of_bos(shards_dir):
    shards = TokenShards.open(shards_dir)
    stream = shards.tokens(0, shards.num_tokens)
    assert shards.document_starts.dtype == np.int64
    assert shards.document_starts.tolist() == np.flatnonzero(stream == 256).tolist()


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_token_width_is_the_narrowest_that_holds_the_vocabulary(tmp_path, vocab_size, width):
    manifest = write_shards(_DOCUMENTS, _ByteTokenizer(vocab_size), tmp_path / "out")
    assert (tmp_path / "out" / "shard-00000.bin").stat().st_size == width * manifest.num_tokens


def test_shards_are_little_endian_tokens(tmp_path):
    write_shards([Document("0", "s", "A")], _ByteTokenizer(), tmp_path / "out")
    assert (tmp_path / "out" / "shard-00000.bin").read_bytes() == bytes([0, 1, 65, 0, 1, 1])


@pytest.mark.parametrize(("shard_tokens", "expected"), [(5, [3, 3, 3, 3]), (6, [6, 6]), (11, [9, 3])])
def test_shard_is_closed_before_it_would_exceed_its_tokens(tmp_path, shard_tokens, expected):
    documents = [Document(f"{i}", "s", "A") for i in range(4)]
    manifest = write_shards(documents, _ByteTokenizer(), tmp_path / "out", shard_tokens=shard_tokens)
    assert [shard.num_items for shard in manifest.shards] == expected


def test_only_a_longer_document_makes_a_shard_exceed_its_tokens(shards_dir):
    shards = TokenShards.open(shards_dir)
    stops = np.cumsum([shard.num_items for shard in shards.manifest.shards])
    for stop, shard in zip(stops, shards.manifest.shards, strict=True):
        within = (shards.document_starts >= stop - shard.num_items) & (shards.document_starts < stop)
        assert shard.num_items <= 16 or within.sum() == 1
    assert max(shard.num_items for shard in shards.manifest.shards) > 16


def test_manifest_counts_documents_tokens_and_bytes_of_each_source(shards_dir):
    for source in TokenShards.open(shards_dir).manifest.sources:
        texts = [document.text.encode() for document in _DOCUMENTS if document.source == source.name]
        assert source.num_documents == len(texts)
        assert source.num_bytes == sum(map(len, texts))
        assert source.num_tokens == sum(map(len, texts)) + 2 * len(texts)


def test_manifest_returned_is_the_manifest_read(tmp_path):
    manifest = write_shards(_DOCUMENTS, _ByteTokenizer(), tmp_path / "out")
    assert TokenShards.open(tmp_path / "out").manifest == manifest
    assert manifest.num_documents == len(_DOCUMENTS)


def test_tokenizer_gets_batches_and_progress_counts_documents(tmp_path):
    tokenizer, counts = _ByteTokenizer(), []
    write_shards(iter(_DOCUMENTS), tokenizer, tmp_path / "out", batch_documents=4, progress=counts.append)
    assert tokenizer.batch_sizes == [4, 4, 3]
    assert counts == [4, 8, 11]


def test_same_documents_make_the_same_files(tmp_path, shards_dir):
    write_shards(_DOCUMENTS, _ByteTokenizer(), tmp_path / "again", shard_tokens=16, batch_documents=9)
    for path in shards_dir.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


# Complete or absent


def test_failure_halfway_leaves_nothing_behind(tmp_path):
    def documents():
        yield from _DOCUMENTS
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        write_shards(documents(), _ByteTokenizer(), tmp_path / "out", shard_tokens=1, batch_documents=2)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_not_to_be_seen_before_it_is_complete(tmp_path):
    seen = []
    write_shards(
        _DOCUMENTS,
        _ByteTokenizer(),
        tmp_path / "out",
        batch_documents=1,
        progress=lambda _: seen.append((tmp_path / "out").exists()),
    )
    assert seen == [False] * len(_DOCUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_files_are_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="expected a new or an empty folder"):
            write_shards(_DOCUMENTS, _ByteTokenizer(), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_and_missing_parents_are_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    for out_dir in (tmp_path / "empty", tmp_path / "a" / "b"):
        write_shards(_DOCUMENTS, _ByteTokenizer(), out_dir)
        TokenShards.open(out_dir).verify()


def test_no_documents_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"no documents to write to .*out"):
        write_shards([], _ByteTokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token_id", [-1, 258])
def test_token_outside_the_vocabulary_is_refused_with_the_document(tmp_path, token_id):
    tokenizer = _ByteTokenizer()
    tokenizer.encode_batch = lambda texts: [[token_id] for _ in texts]
    with pytest.raises(ValueError, match=f"document '0': token ids .*{token_id}.*; expected 0 to 257"):
        write_shards(_DOCUMENTS, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(("shard_tokens", "batch_documents"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(tmp_path, shard_tokens, batch_documents):
    sizes = {"shard_tokens": shard_tokens, "batch_documents": batch_documents}
    with pytest.raises(ValueError, match=f"{shard_tokens=} and {batch_documents=}"):
        write_shards(_DOCUMENTS, _ByteTokenizer(), tmp_path / "out", **sizes)


# Damaged folders


@pytest.mark.parametrize("name", ["shard-00001.bin", "documents.npy"])
def test_truncated_file_is_refused_with_bytes_found_and_expected(shards_dir, name):
    size = (shards_dir / name).stat().st_size
    (shards_dir / name).write_bytes((shards_dir / name).read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{name}: {size - 2} bytes; the manifest expects {size}"):
        TokenShards.open(shards_dir)


@pytest.mark.parametrize("name", ["shard-00000.bin", "documents.npy", "manifest.json"])
def test_missing_file_is_refused_by_name(shards_dir, name):
    (shards_dir / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: (missing|no such file)"):
        TokenShards.open(shards_dir)


def _set_version(fields: dict) -> None:
    fields["version"] = 99


def _set_dtype(fields: dict) -> None:
    fields["dtype"] = "float32"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set_version, "format version 99 .*expected version 1"),
        (_set_dtype, "'float32' tokens; expected .*uint16, uint32"),
        (lambda fields: fields.pop("bos_id"), "bos_id"),
        (lambda fields: fields.pop("version"), "version"),
        (lambda fields: fields["shards"][0].pop("sha256"), "sha256"),
        (lambda fields: fields.update(colour="red"), "colour"),
    ],
    ids=["version", "dtype", "no-bos", "no-version", "no-checksum", "unknown-key"],
)
def test_manifest_of_another_format_is_refused(shards_dir, damage: Callable[[dict], object], message):
    path = shards_dir / "manifest.json"
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"manifest.json: not a manifest .*{message}"):
        TokenShards.open(shards_dir)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"version": 1'], ids=["empty", "list", "cut"])
def test_manifest_that_is_not_a_json_object_is_refused(shards_dir, text):
    (shards_dir / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json: not a manifest"):
        TokenShards.open(shards_dir)


@pytest.mark.parametrize("name", ["shard-00002.bin", "documents.npy"])
def test_verify_finds_a_changed_byte(shards_dir, name):
    shards = TokenShards.open(shards_dir)
    shards.verify()
    data = bytearray((shards_dir / name).read_bytes())
    data[-1] ^= 1
    (shards_dir / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: sha256"):
        shards.verify()


def test_shards_of_another_tokenizer_are_refused(shards_dir):
    shards = TokenShards.open(shards_dir)
    shards.check_tokenizer("bytes-1")
    with pytest.raises(ValueError, match="made with tokenizer bytes-1, not with other"):
        shards.check_tokenizer("other")
