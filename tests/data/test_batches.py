"""Claims about packed batches: windows tile the stream, targets stay in the document, resuming loses nothing.

Documents are drawn by hypothesis, shorter and longer than windows and shards.
This room does not test files.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv2.data import IGNORED, Batch, BatchLoader, Document, TokenShards, write_shards

_settings = settings(derandomize=True, database=None, max_examples=50, deadline=None)


class _ByteTokenizer:
    bos_id, eos_id, vocab_size, fingerprint = 256, 257, 258, "bytes"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def _make_shards(folder: str | Path, num_letters: list[int]) -> TokenShards:
    """Documents of so many letters, no two neighbours alike."""
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(n)) for i, n in enumerate(num_letters)]
    documents = [Document(f"{i}", "s", text) for i, text in enumerate(texts)]
    write_shards(documents, _ByteTokenizer(), Path(folder) / "shards", shard_tokens=20)
    return TokenShards.open(Path(folder) / "shards")


@pytest.fixture
def shards(tmp_path) -> TokenShards:
    """100 tokens: 25 windows of 4."""
    return _make_shards(tmp_path, [3, 0, 40, 1, 7, 12, 0, 0, 19])


def _loader(shards: TokenShards, **changes: int) -> BatchLoader:
    return BatchLoader(shards, **({"sequence_length": 4, "batch_sequences": 4, "seed": 0} | changes))


def _ids(loader: BatchLoader, num_batches: int) -> list[int]:
    return [int(i) for _ in range(num_batches) for i in loader.next().sequence_ids]


def _assert_equal(left: Batch, right: Batch) -> None:
    for name in ("tokens", "targets", "cu_seqlens", "sequence_ids"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def _concatenated(parts: list[Batch]) -> Batch:
    offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
    stops = [part.cu_seqlens[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
    return Batch(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([[0], *stops]),
        np.concatenate([part.sequence_ids for part in parts]),
    )


# What a batch holds


@_settings
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 9))
def test_segments_of_an_epoch_are_the_documents_cut_at_window_borders(num_letters, sequence_length):
    with tempfile.TemporaryDirectory() as folder:
        shards = _make_shards(folder, num_letters)
        num_windows = shards.num_tokens // sequence_length
        assume(num_windows)
        batch = _loader(shards, sequence_length=sequence_length, batch_sequences=num_windows).next()
        window_starts = np.repeat(batch.sequence_ids, sequence_length) * sequence_length
        places = window_starts + np.arange(len(batch.tokens)) % sequence_length
        found = {int(part[0]): part.tolist() for part in np.split(places, batch.cu_seqlens[1:-1])}
        borders = {*range(0, num_windows * sequence_length + 1, sequence_length)}
        borders |= {int(s) for s in shards.document_starts if s < num_windows * sequence_length}
        cuts = sorted(borders)
        assert found == {a: list(range(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)}


@_settings
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 9))
def test_targets_are_the_next_token_of_the_same_document(num_letters, sequence_length):
    with tempfile.TemporaryDirectory() as folder:
        shards = _make_shards(folder, num_letters)
        num_windows = shards.num_tokens // sequence_length
        assume(num_windows)
        stream = shards.tokens(0, shards.num_tokens)
        expected = np.append(stream[1:], IGNORED)
        expected[stream == _ByteTokenizer.eos_id] = IGNORED
        batch = _loader(shards, sequence_length=sequence_length, batch_sequences=num_windows).next()
        for i, window_id in enumerate(batch.sequence_ids.tolist()):
            rows = slice(i * sequence_length, (i + 1) * sequence_length)
            part = slice(window_id * sequence_length, (window_id + 1) * sequence_length)
            assert batch.tokens[rows].tolist() == stream[part].tolist()
            assert batch.targets[rows].tolist() == expected[part].tolist()


def test_last_token_of_a_window_has_its_target_in_the_next_window(shards):
    batch = _loader(shards, batch_sequences=25).next()
    stream = shards.tokens(0, shards.num_tokens)
    # Window 2 ends inside the document of 40 letters.
    place = int(np.flatnonzero(batch.sequence_ids == 2)[0])
    assert batch.targets[place * 4 + 3] == stream[12]


def test_batch_has_the_promised_types_and_shapes(shards):
    batch = _loader(shards, batch_sequences=6, num_ranks=2).next()
    assert (batch.tokens.dtype, batch.tokens.shape) == (np.int64, (12,))
    assert (batch.targets.dtype, batch.targets.shape) == (np.int64, (12,))
    assert (batch.sequence_ids.dtype, batch.sequence_ids.shape) == (np.int64, (3,))
    assert (batch.cu_seqlens.dtype, batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (np.int32, 0, 12)


# The order of windows


@pytest.mark.parametrize("batch_sequences", [1, 4, 7, 25, 60])
def test_every_window_is_seen_exactly_once_an_epoch(shards, batch_sequences):
    loader = _loader(shards, batch_sequences=batch_sequences)
    ids = _ids(loader, -(-100 // batch_sequences))
    for epoch in range(4):
        assert sorted(ids[25 * epoch : 25 * (epoch + 1)]) == list(range(25))


def test_incomplete_tail_is_dropped(shards):
    assert sorted(_ids(_loader(shards, sequence_length=30, batch_sequences=3), 1)) == [0, 1, 2]


def test_epochs_have_different_orders(shards):
    ids = _ids(_loader(shards, batch_sequences=25), 3)
    assert len({tuple(ids[25 * epoch : 25 * (epoch + 1)]) for epoch in range(3)}) == 3
    assert ids[:25] != sorted(ids[:25])


def test_order_follows_from_the_seed(shards):
    first, again, other = (_ids(_loader(shards, seed=seed), 6) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_order_is_the_same_on_every_machine_and_numpy(shards):
    # Stability only: sorted(range(25), key=PCG64([0, 0]).random_raw(25).__getitem__)[:8] under numpy 2.3.5.
    assert _ids(_loader(shards), 2) == [11, 3, 20, 13, 2, 21, 15, 1]


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_ranks_together_hold_the_batch_of_one_rank(shards, num_ranks):
    whole = _loader(shards, batch_sequences=6)
    ranks = [_loader(shards, batch_sequences=6, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    # Nine batches of 6 pass the border between epochs of 25 twice, within a batch.
    for _ in range(9):
        _assert_equal(whole.next(), _concatenated([loader.next() for loader in ranks]))


# Resuming


def _resumed(state: dict, shards: TokenShards, **changes: int) -> BatchLoader:
    loader = _loader(shards, **changes)
    loader.load_state(json.loads(json.dumps(state)))
    return loader


@pytest.mark.parametrize("num_before", [0, 1, 6, 7, 20])
def test_resumed_is_uninterrupted(shards, num_before):
    loader = _loader(shards)
    for _ in range(num_before):
        loader.next()
    resumed = _resumed(loader.state(), shards)
    for _ in range(8):
        _assert_equal(resumed.next(), loader.next())


def test_loader_can_be_set_back(shards):
    loader = _loader(shards)
    start = loader.state()
    ids = _ids(loader, 9)
    loader.load_state(start)
    assert _ids(loader, 9) == ids


def test_other_batch_size_and_rank_count_continue_with_the_next_unseen_window(shards):
    uninterrupted = _ids(_loader(shards, batch_sequences=1), 70)
    loader = _loader(shards, batch_sequences=8, rank=1, num_ranks=2)
    for _ in range(3):
        loader.next()
    ranks = [_resumed(loader.state(), shards, batch_sequences=6, rank=r, num_ranks=3) for r in range(3)]
    resumed = [i for _ in range(7) for rank in ranks for i in _ids(rank, 1)]
    assert resumed == uninterrupted[24 : 24 + 42]


@pytest.mark.parametrize("change", [{"seed": 1}, {"sequence_length": 5}])
def test_state_of_another_order_is_refused(shards, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name}={change[name]}; this run has"):
        _loader(shards).load_state(_loader(shards, **change).state())


def test_state_of_another_corpus_is_refused(shards, tmp_path):
    (tmp_path / "other").mkdir()
    state = _loader(_make_shards(tmp_path / "other", [50])).state()
    with pytest.raises(ValueError, match="num_tokens=52; this run has 100"):
        _loader(shards).load_state(state)


@pytest.mark.parametrize("seen", [None, -1, "3"])
def test_state_without_a_count_is_refused(shards, seen):
    with pytest.raises(ValueError, match=f"sequences_seen={seen}"):
        _loader(shards).load_state(_loader(shards).state() | {"sequences_seen": seen})


# Refusals


def test_too_few_tokens_for_a_window_are_refused(shards):
    assert _loader(shards, sequence_length=100).num_windows == 1
    with pytest.raises(ValueError, match="100 tokens .*sequence_length=101"):
        _loader(shards, sequence_length=101)


def test_batch_that_ranks_cannot_share_is_refused(shards):
    with pytest.raises(ValueError, match="batch_sequences=4 must be divisible by num_ranks=3"):
        _loader(shards, num_ranks=3)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_out_of_range_is_refused(shards, rank):
    with pytest.raises(ValueError, match=f"rank={rank} .*num_ranks=2"):
        _loader(shards, rank=rank, num_ranks=2)


@pytest.mark.parametrize("change", [{"sequence_length": 0}, {"batch_sequences": 0}, {"seed": -1}])
def test_nonsense_sizes_are_refused(shards, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} >= .*got .*{name}={change[name]}"):
        _loader(shards, **change)
