"""Held-out bits per byte: every token is predicted once, with the context that the window says, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv2.data import Document, TokenShards, write_shards
from dsv2.model import Transformer
from dsv2.text import Tokenizer
from dsv2.train.evaluate import SourceScore, bits_per_byte
from tests.numerics import random_model
from tests.train.tiny import documents, small_model

WHOLE = 4096  # longer than any document


@pytest.fixture(scope="module")
def model(held_out: TokenShards) -> Transformer:
    return random_model(small_model(held_out.vocab_size))


@torch.no_grad()
def nats(model: Transformer, tokens: np.ndarray, first: int, context_starts: int = 0) -> float:
    """-log p of tokens[first:], each given those from `context_starts` on; one sequence, float64 after the logits."""
    logits = model(torch.from_numpy(tokens[context_starts:-1])).double().log_softmax(-1)
    return -sum(float(logits[i - 1 - context_starts, tokens[i]]) for i in range(first, len(tokens)))


def by_hand(model: Transformer, shards: TokenShards, window: int, stride: int) -> dict[str, SourceScore]:
    """Windows of `window` inputs that start `stride` apart; a token is scored in the first window that reaches it."""
    scores: dict[str, SourceScore] = {}
    for source, num_bytes, tokens in shards.documents():
        score = scores.setdefault(source, SourceScore())
        score.num_bytes += num_bytes
        score.num_tokens += len(tokens)
        scored = 1
        for start in range(0, len(tokens), stride):
            if scored < len(tokens):
                reach = tokens[: start + window + 1]
                score.nats += nats(model, reach, scored, start)
                scored = len(reach)
    return scores


def assert_same_scores(found: dict[str, SourceScore], expected: dict[str, SourceScore]) -> None:
    assert list(found) == list(expected)
    for source, score in expected.items():
        assert found[source].nats == pytest.approx(score.nats, rel=1e-5), source
        assert found[source].num_tokens == score.num_tokens
        assert found[source].num_bytes == pytest.approx(score.num_bytes)


def test_a_window_longer_than_every_document_scores_each_alone_and_whole(
    model: Transformer, held_out: TokenShards
) -> None:
    expected: dict[str, SourceScore] = {}
    for source, num_bytes, tokens in held_out.documents():
        score = expected.setdefault(source, SourceScore())
        score.nats += nats(model, tokens, 1)
        score.num_bytes += num_bytes
        score.num_tokens += len(tokens)
    found = bits_per_byte(model, held_out, window=WHOLE)
    assert_same_scores(found, expected)
    for source, score in expected.items():
        bits = score.nats / math.log(2) / score.num_bytes
        assert found[source].bits_per_byte == pytest.approx(bits, rel=1e-5)


@pytest.fixture(scope="module")
def two_documents(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("short") / "shards"
    write_shards(documents(4, 2, words=40), Tokenizer.load(corpus / "tokenizer"), folder)
    return TokenShards.open(folder)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 8), (16, 5), (16, 1), (1, 1), (37, 36)])
def test_windows_score_what_a_sliding_loop_scores(
    model: Transformer, two_documents: TokenShards, window: int, stride: int | None
) -> None:
    assert min(len(tokens) for _, _, tokens in two_documents.documents()) > 40
    found = bits_per_byte(model, two_documents, window=window, stride=stride)
    assert_same_scores(found, by_hand(model, two_documents, window, stride or window))


class Counting(torch.nn.Module):
    """A stand-in that notes what it is asked; it gives every id the same probability."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.head_weight = torch.zeros(vocab_size, 1)
        self.rows: list[int] = []

    def model(self, tokens: torch.Tensor, context: object) -> torch.Tensor:
        self.rows.append(len(tokens))
        return torch.zeros(len(tokens), 1)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 1), (WHOLE, WHOLE)])
def test_every_token_but_the_first_is_scored_once(held_out: TokenShards, window: int, stride: int) -> None:
    counting = Counting(held_out.vocab_size)
    scores = bits_per_byte(counting, held_out, window=window, stride=stride)  # type: ignore[arg-type]
    predicted: dict[str, int] = {}
    for source, _, tokens in held_out.documents():
        predicted[source] = predicted.get(source, 0) + len(tokens) - 1
    counted = {source: s.nats / math.log(held_out.vocab_size) for source, s in scores.items()}
    assert counted == {source: pytest.approx(n, rel=1e-5) for source, n in predicted.items()}


@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_how_many_windows_share_a_pass_changes_nothing(
    model: Transformer, held_out: TokenShards, batch_tokens: int
) -> None:
    found = bits_per_byte(model, held_out, window=16, batch_tokens=batch_tokens)
    assert_same_scores(found, bits_per_byte(model, held_out, window=16))


def test_passes_are_as_large_as_asked(held_out: TokenShards) -> None:
    counting = Counting(held_out.vocab_size)
    bits_per_byte(counting, held_out, window=16, batch_tokens=64)  # type: ignore[arg-type]
    assert max(counting.rows) < 64 + 16
    assert all(rows >= 64 for rows in counting.rows[:-1])


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_a_token(held_out: TokenShards) -> None:
    blank = Transformer(small_model(held_out.vocab_size))
    for p in blank.parameters():
        p.data.zero_()
    scores = bits_per_byte(blank, held_out, window=WHOLE)
    for source in scores:
        mine = [(num_bytes, len(tokens)) for name, num_bytes, tokens in held_out.documents() if name == source]
        bits = math.log2(held_out.vocab_size) * sum(n - 1 for _, n in mine) / sum(b for b, _ in mine)
        assert scores[source].bits_per_byte == pytest.approx(bits, rel=1e-6)


# Cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [2, 60, 10**6])
def test_a_limit_cuts_every_source_and_its_bytes_in_proportion(
    model: Transformer, held_out: TokenShards, max_tokens: int
) -> None:
    expected: dict[str, SourceScore] = {}
    for source, num_bytes, tokens in held_out.documents():
        score = expected.setdefault(source, SourceScore())
        room = min(len(tokens), max_tokens - score.num_tokens)
        if room >= 2:
            score.nats += nats(model, tokens[:room], 1)
            score.num_tokens += room
            score.num_bytes += num_bytes * room / len(tokens)
    found = bits_per_byte(model, held_out, window=WHOLE, max_tokens=max_tokens)
    assert_same_scores(found, expected)
    assert all(s.num_tokens <= max_tokens for s in found.values())


def test_a_limit_within_the_first_document_leaves_its_score_about_the_same(
    model: Transformer, tmp_path: Path, corpus: Path
) -> None:
    # A text that repeats itself: half of it scores like all of it, if its bytes are cut as its tokens are.
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    write_shards([Document("a", "prose", "tea " * 200)], tokenizer, tmp_path / "shards")
    shards = TokenShards.open(tmp_path / "shards")
    whole, half = (bits_per_byte(model, shards, window=WHOLE, max_tokens=n)["prose"] for n in (None, 150))
    assert half.num_tokens == 150 < 0.8 * whole.num_tokens
    assert half.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.05)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), [(16, 17), (16, 0), (16, -1), (0, None), (-4, None)])
def test_a_stride_outside_the_window_is_refused(
    model: Transformer, held_out: TokenShards, window: int, stride: int | None
) -> None:
    with pytest.raises(ValueError, match=f"stride=.* must be between 1 and window={window}"):
        bits_per_byte(model, held_out, window=window, stride=stride)


def test_evaluation_never_drops_a_token(
    model: Transformer, held_out: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("dsv2.model.moe.drop_rows", lambda *arguments: asked.append(arguments))
    assert model.cfg.moe is not None and model.cfg.moe.device_limit == (4, 2)
    bits_per_byte(model.train(), held_out, window=32)
    assert asked == []


def test_nothing_scored_is_not_a_number() -> None:
    assert math.isnan(SourceScore().bits_per_byte)
