"""Claims about duplicates: equal and nearly equal texts are found, the first stays, distinct texts are left alone.

Texts are seeded random words; how nearly equal two of them are is counted, not assumed.
This room does not test filters or files.
"""

import random

import numpy as np
import pytest

from dsv2.config.data import DedupConfig
from dsv2.data.dedup import EXACT, NEAR, UNIQUE, MinHash, find_duplicates, lots, text_digest
from dsv2.data.ngrams import ngram_hashes, split_words, word_hashes


def draw(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghij", k=5)) for _ in range(count)]


def with_changes(words: list[str], num_changes: int) -> list[str]:
    """So many words replaced, far from each other: each changes five 5-grams."""
    changed = list(words)
    for i in range(num_changes):
        changed[(i + 1) * len(words) // (num_changes + 1)] = f"new{i}"
    return changed


def jaccard(left: list[str], right: list[str]) -> float:
    a, b = (set(ngram_hashes(word_hashes(words), 5).tolist()) for words in (left, right))
    return len(a & b) / len(a | b)


def kinds(texts: list[str]) -> list[int]:
    min_hash = MinHash(DedupConfig(), seed=0)
    bands = np.stack([min_hash.bands(word_hashes(split_words(text))) for text in texts])
    return find_duplicates(np.stack([text_digest(text) for text in texts]), bands.T).tolist()


# Exact


def test_blanks_and_unicode_composition_make_no_difference():
    assert (text_digest(" caf\u00e9\n\tau lait ") == text_digest("cafe\u0301 au lait")).all()


@pytest.mark.parametrize("other", ["Café au lait", "café, au lait", "caféau lait"])
def test_letters_and_punctuation_do(other):
    assert (text_digest("café au lait") != text_digest(other)).any()


def test_the_first_of_equal_texts_stays():
    digests = np.stack([text_digest(text) for text in ["a", "b", "a", "c", "b", "a"]])
    assert find_duplicates(digests, []).tolist() == [UNIQUE, UNIQUE, EXACT, UNIQUE, EXACT, EXACT]


def test_no_texts_have_no_duplicates():
    assert find_duplicates(np.empty((0, 2), np.uint64), [np.empty(0, np.uint64)]).tolist() == []


# Near


def test_texts_nine_tenths_alike_are_found_and_distinct_ones_left():
    """Recall by the bands' formula is 0.9996 at 0.9: of 200 planted pairs at most one may be missed."""
    originals = [draw(400, seed) for seed in range(200)]
    copies = [with_changes(words, 4) for words in originals]
    assert min(map(jaccard, originals, copies)) == pytest.approx(0.9, abs=0.01)
    found = kinds([" ".join(words) for words in originals + copies])
    assert found[:200] == [UNIQUE] * 200
    assert found[200:].count(NEAR) >= 199


def test_texts_less_than_two_tenths_alike_are_distinct():
    """By the bands' formula one of 50,000 such pairs would be taken for a duplicate."""
    originals = [draw(400, seed) for seed in range(50)]
    copies = [with_changes(words, 60) for words in originals]
    assert 0.1 < max(map(jaccard, originals, copies)) < 0.2
    assert kinds([" ".join(words) for words in originals + copies]) == [UNIQUE] * 100


def test_bands_meet_as_often_as_the_jaccard_index_says():
    # Each of 2000 bands of one row is a trial of chance J; three standard deviations are 0.033.
    original = draw(300, 0)
    other = with_changes(original, 20)
    min_hash = MinHash(DedupConfig(bands=2000, rows=1), seed=0)
    met = min_hash.bands(word_hashes(original)) == min_hash.bands(word_hashes(other))
    assert abs(met.mean() - jaccard(original, other)) < 0.033


def test_case_and_punctuation_are_near_not_exact():
    text = " ".join(draw(100, 0))
    assert kinds([text, text.upper() + "!"]) == [UNIQUE, NEAR]


def test_chinese_is_compared_by_letters():
    rng = random.Random(0)
    text = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(500))
    other = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(500))
    assert kinds([text, text[:250] + "新" + text[250:], other]) == [UNIQUE, NEAR, UNIQUE]


@pytest.mark.parametrize("text", ["", "one two"])
def test_texts_shorter_than_an_ngram_are_compared_whole(text):
    assert kinds([text, f"{text}.", "three four"]) == [UNIQUE, NEAR, UNIQUE]


def test_a_chain_of_near_duplicates_leaves_its_first():
    # Neighbours share a band, the ends of the chain share none.
    digests = np.stack([text_digest(str(i)) for i in range(6)])
    bands = [np.array([0, 1, 2, 3, 4, 5], np.uint64), np.array([9, 8, 8, 7, 7, 6], np.uint64)]
    bands.append(np.array([5, 5, 4, 4, 3, 3], np.uint64))
    assert find_duplicates(digests, bands).tolist() == [UNIQUE, NEAR, NEAR, NEAR, NEAR, NEAR]


def test_exact_duplicates_link_nothing_that_their_first_does_not():
    digests = np.stack([text_digest(text) for text in ["a", "a", "b"]])
    bands = [np.array([1, 1, 2], np.uint64)]
    assert find_duplicates(digests, bands).tolist() == [UNIQUE, EXACT, UNIQUE]


def test_signatures_are_the_same_on_every_machine_and_numpy():
    # Stability only: this function, numpy 2.3.5.
    bands = MinHash(DedupConfig(bands=2, rows=2), seed=0).bands(word_hashes(split_words("深度 seek a b c d")))
    assert [hex(band) for band in bands.tolist()] == ["0x29e2d03e2b42c542", "0x7bc712f972317b7e"]


# Lots


def test_lots_of_two_purposes_are_uniform_and_independent():
    digests = np.stack([text_digest(str(i)) for i in range(4000)])
    first, second = (lots(digests, purpose) / 2**64 for purpose in ("held out", "fim"))
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
