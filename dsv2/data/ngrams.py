"""Words of a text, and runs of words as numbers: what filters, deduplication and benchmarks are compared by.

The paper does not describe its own. Hashes are the same on every machine and numpy; collisions are left in, they are
one in 2^32 words. This room decides nothing about a text.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

import numpy as np

HAN = "㐀-鿿豈-﫿"
_WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")


def split_words(text: str) -> list[str]:
    """Words in lower case without punctuation, in NFKC; each Chinese letter is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_hashes(words: list[str]) -> np.ndarray:
    """A number for each word, [n] uint64."""
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    return mix(hashes)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """A number for each run of `n` words, [max(len - n + 1, 0)] uint64: a polynomial over the words, mixed."""
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return mix(total)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value. uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
