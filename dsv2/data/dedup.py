"""Duplicates: equal texts by a digest, nearly equal ones by MinHash and banding. The first of a cluster stays.

The paper only says that its data passed the stages of DeepSeek 67B, which deduplicated all crawls together (arXiv
2401.02954, section 2.1); MinHash is Broder 1997 with the bands of `DedupConfig`. This room knows no files.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np

from dsv2.config.data import DedupConfig
from dsv2.data.ngrams import mix, ngram_hashes

UNIQUE, EXACT, NEAR = 0, 1, 2
# What one step of hashing holds: 2048 n-grams by some hundred hash functions, 2 MB.
_BLOCK = 2048


def text_digest(text: str) -> np.ndarray:
    """128 bits of the text, [2] uint64, the same for texts that differ in blanks or Unicode composition only."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return np.frombuffer(hashlib.blake2b(normal.encode(), digest_size=16).digest(), "<u8")


def lots(digests: np.ndarray, purpose: str) -> np.ndarray:
    """A number drawn for each text, [N, 2] -> [N] uint64, uniform, by a hash of it: independent for each purpose."""
    return mix(digests[:, 0] ^ np.uint64(int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest())))


class MinHash:
    """One number a band, equal for two texts with the chance J^rows, where J is the Jaccard index of their n-grams."""

    def __init__(self, cfg: DedupConfig, seed: int) -> None:
        self._ngram, self._shape = cfg.ngram, (cfg.bands, cfg.rows)
        # PCG64's raw output is the same in every numpy.
        raw = np.random.PCG64(seed).random_raw(2 * cfg.bands * cfg.rows)
        factors, self._offsets = np.split(raw, 2)
        self._factors = factors | np.uint64(1)

    def bands(self, hashes: np.ndarray) -> np.ndarray:
        """[bands] uint64, of a text's `word_hashes`. A text shorter than the n-gram is one n-gram."""
        grams = ngram_hashes(hashes, min(self._ngram, max(len(hashes), 1)))
        # Multiply, add, take the high bits: universal for numbers of 32 bits (Dietzfelbinger 1996).
        grams = np.unique(grams >> np.uint64(32))
        low = np.full(len(self._factors), 2**32 - 1, np.uint64)
        for start in range(0, len(grams), _BLOCK):
            values = (grams[start : start + _BLOCK, None] * self._factors + self._offsets) >> np.uint64(32)
            np.minimum(low, values.min(axis=0), out=low)
        return _hash_rows(low.reshape(self._shape))


def _hash_rows(values: np.ndarray) -> np.ndarray:
    """One number for each row, [m, n] -> [m] uint64."""
    total = np.zeros(len(values), np.uint64)
    for column in values.T:
        total = mix(total ^ column)
    return total


def find_duplicates(digests: np.ndarray, bands: Iterable[np.ndarray]) -> np.ndarray:
    """UNIQUE, EXACT or NEAR for each of N texts, [N] uint8; of texts that belong together the first is UNIQUE.

    Belonging together is transitive. Some 40 bytes a text are held beside the arguments.

    Args:
        digests: [N, 2] uint64, of `text_digest`.
        bands: arrays [N] uint64, of `MinHash.bands`, one at a time; none: exact duplicates only.
    """
    kinds = np.zeros(len(digests), np.uint8)
    kinds[_later(np.lexsort((digests[:, 1], digests[:, 0])), digests)[1]] = EXACT
    left = np.flatnonzero(kinds == UNIQUE)
    pairs = [np.empty((2, 0), np.int64)]
    for band in bands:
        keys = band[left]
        pairs.append(np.stack(_later(np.argsort(keys, kind="stable"), keys[:, None])))
    first, later = np.unique(np.concatenate(pairs, axis=1), axis=1)
    kinds[left[_lowest(len(left), first, later) < np.arange(len(left))]] = NEAR
    return kinds


def _later(order: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (first, later) of places with equal rows of `keys`; `order` sorts these, equal ones as they stood."""
    ranked = keys[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = order[starts][starts.cumsum() - 1]
    return first[~starts], order[~starts]


def _lowest(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The lowest place that each of `count` places is connected with by the pairs, [count] int64."""
    labels = np.arange(count)
    while True:
        before = labels.copy()
        low = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, left, low)
        np.minimum.at(labels, right, low)
        labels = labels[labels]
        if (labels == before).all():
            return labels
