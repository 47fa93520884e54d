"""What is drafted, exactly, and that a long sequence costs no more per token than a short one."""

from __future__ import annotations

import random
from collections import abc
from typing import Any

import pytest

from dsv2.engine.ngram import NgramDrafts


def plain(token_ids: list[int], num_tokens: int, min_n: int, max_n: int) -> list[int]:
    """The definition: the longest last run that stood before, at its latest occurrence, and what followed it."""
    end = len(token_ids)
    for size in range(max_n, min_n - 1, -1):
        for follower in range(end - 1, size - 1, -1):
            if size < end and token_ids[follower - size : follower] == token_ids[end - size :]:
                followed = token_ids[follower:]
                return (followed * num_tokens)[:num_tokens]
    return []


@pytest.mark.parametrize(
    ("token_ids", "drafted"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 1, 2, 4, 8, 7, 1, 2], [4, 8, 7]),
        ([7, 1, 2, 3, 4, 5, 6, 1, 2, 8, 8, 7, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 4, 5], []),
        ([2, 3, 4, 2], []),
        ([1, 2, 1, 2], [1, 2, 1]),
        ([5, 5, 5], [5, 5, 5]),
        ([5, 5], []),
        ([5], []),
        ([], []),
    ],
    ids=[
        "what followed",
        "the latest occurrence",
        "of the longest run",
        "nothing new",
        "a run of one token is too short",
        "a period goes on",
        "a repeated token goes on",
        "a run is not its own occurrence",
        "one token",
        "no token",
    ],
)
def test_drafts_are(token_ids: list[int], drafted: list[int]) -> None:
    assert NgramDrafts().propose(token_ids, 3) == drafted


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (1, 3), (2, 4), (3, 3)])
@pytest.mark.parametrize("num_symbols", [2, 5])
def test_drafts_of_a_growing_sequence_are_those_of_the_definition(min_n: int, max_n: int, num_symbols: int) -> None:
    rng = random.Random(0)
    token_ids: list[int] = []
    drafts = NgramDrafts(min_n, max_n)
    num_drafted = 0
    for _ in range(150):
        token_ids += rng.choices(range(num_symbols), k=rng.randint(0, 3))
        drafted = drafts.propose(token_ids, 4)
        assert drafted == plain(token_ids, 4, min_n, max_n)
        num_drafted += bool(drafted)
    assert num_drafted > 50


class Counting(list[int]):
    """Counts the elements that are read."""

    num_reads = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_reads += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> abc.Iterator[int]:
        raise AssertionError("a scan of the whole sequence")


@pytest.mark.parametrize("num_tokens", [100, 10_000])
def test_a_token_costs_a_few_reads_however_long_the_sequence_is(num_tokens: int) -> None:
    rng, token_ids, drafts = random.Random(0), Counting(), NgramDrafts(2, 4)
    for _ in range(num_tokens):
        token_ids.append(rng.randrange(4))
        drafts.propose(token_ids, 3)
    # To enter it 2 + 3 + 4, to look up as many, and to propose 3.
    assert token_ids.num_reads <= 21 * num_tokens


@pytest.mark.parametrize(("min_n", "max_n"), [(0, 3), (4, 3)])
def test_lengths_that_make_no_run_are_refused(min_n: int, max_n: int) -> None:
    with pytest.raises(ValueError, match=f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n"):
        NgramDrafts(min_n, max_n)
