"""The pages of the cache: who uses which, and which hold tokens that others may read.

A page of 64 tokens is written by one sequence only. Once it is full its key, a hash of all tokens up to its end, can be
published, and others with the same beginning read it instead of computing it. Only full pages are shared, so none is
ever copied. A published page that nobody uses stays until its place is needed, the longest unused first.

This room numbers pages; it holds no tensors and knows no sequences.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, abc
from hashlib import blake2b

# 256 bits: equal keys mean equal tokens, also where somebody searches for a collision.
_KEY_BYTES = 32


def root_key(salt: str = "") -> bytes:
    """Parent of a first page's key. Sequences of different salt (such as different adapters) share nothing."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES, person=b"root").digest()


def page_key(parent: bytes, token_ids: abc.Iterable[int]) -> bytes:
    """Key of a full page with these tokens after the page (or root) of key `parent`: it stands for all of them."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES, person=b"page").digest()


class PagePool:
    """`num_pages` pages, each of them free, in use by some number of sequences, or idle: published and not in use.

    A page's key is first promised, by who is about to compute it, then published, when it is computed. Nothing here
    looks into pages: that a key tells the truth about its page is up to who publishes it.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._num_users = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages  # promised or published
        self._promised: dict[bytes, int] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    def num_users(self, page: int) -> int:
        return self._num_users[page]

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def allocate(self) -> int:
        """A page of one user, who may write it. Forgets the idle page that was unused longest where none is free.

        Raises IndexError where none is available.
        """
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget_key(page)
        else:
            raise IndexError(f"all {self.num_pages} pages are in use")
        self._num_users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of a published page, who may read it."""
        assert self._is_published(page), f"page {page} is not published"
        self._idle.pop(page, None)
        self._num_users[page] += 1

    def release(self, page: int) -> None:
        """One user less. After the last one a published page is idle and any other free, its promise broken."""
        assert self._num_users[page] > 0, f"page {page} is not in use"
        self._num_users[page] -= 1
        if self._num_users[page]:
            return
        if self._is_published(page):
            self._idle[page] = None
        else:
            self._forget_key(page)
            self._free.append(page)

    def find(self, key: bytes) -> int | None:
        """The published page of this key."""
        return self._published.get(key)

    def is_promised(self, key: bytes) -> bool:
        return key in self._promised

    def promise(self, page: int, key: bytes) -> None:
        """The user of `page` is about to write the tokens of `key`. Without effect where others did or promised so."""
        if key not in self._published and key not in self._promised:
            self._promised[key] = page
            self._key_of[page] = key

    def publish(self, page: int, key: bytes) -> None:
        """`page` holds the tokens of `key`, and is not written again. Stays private where another page is published."""
        self._forget_key(page)
        if key not in self._published:
            self._published[key] = page
            self._key_of[page] = key

    def forget(self) -> None:
        """No page is published any more. Raises ValueError while pages are in use."""
        num_used = self.num_pages - self.num_available
        if num_used:
            raise ValueError(f"{num_used} pages are in use: their sequences must finish before pages are forgotten")
        while self._idle:
            page, _ = self._idle.popitem()
            self._forget_key(page)
            self._free.append(page)

    def _is_published(self, page: int) -> bool:
        key = self._key_of[page]
        return key is not None and self._published.get(key) == page

    def _forget_key(self, page: int) -> None:
        key, self._key_of[page] = self._key_of[page], None
        if key is None:
            return
        table = self._published if self._published.get(key) == page else self._promised
        del table[key]
