"""Pages: counts balance, a key finds a page with its tokens only, and what was unused longest goes first."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2.config.engine import PAGE_SIZE
from dsv2.engine.blocks import PagePool, page_key, root_key
from dsv2.kernels import latent_cache, mla_decode

_settings = settings(derandomize=True, database=None, max_examples=100, deadline=None)

TOKENS = list(range(PAGE_SIZE))


def key(number: int) -> bytes:
    return page_key(root_key(), [number] * PAGE_SIZE)


def idle_pages(pool: PagePool, numbers: range) -> list[int]:
    """Pages published under `key` of the numbers, then released in that order."""
    pages = [pool.allocate() for _ in numbers]
    for number, page in zip(numbers, pages, strict=True):
        pool.publish(page, key(number))
    for page in pages:
        pool.release(page)
    return pages


def test_the_page_is_the_kernels_page() -> None:
    assert PAGE_SIZE == latent_cache.PAGE_SIZE == mla_decode.PAGE


# Keys -------------------------------------------------------------------------------------------------------------


def test_a_key_stands_for_the_page_its_place_and_everything_before_it() -> None:
    first = page_key(root_key(), TOKENS)
    others = [
        page_key(root_key(), TOKENS[::-1]),
        page_key(root_key(), [*TOKENS[:-1], 2**40]),
        page_key(root_key("adapter"), TOKENS),
        page_key(first, TOKENS),
        page_key(page_key(root_key(), TOKENS[::-1]), TOKENS),
        root_key(),
        root_key("adapter"),
    ]
    assert len({first, *others}) == len(others) + 1
    assert first == page_key(root_key(), TOKENS)


def test_keys_are_too_long_to_collide_by_search() -> None:
    assert len(page_key(root_key(), TOKENS)) * 8 >= 256


# Pages ------------------------------------------------------------------------------------------------------------


def test_every_page_is_given_once_and_then_none() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError, match="all 5 pages are in use"):
        pool.allocate()


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1"):
        PagePool(0)


def test_a_published_page_outlives_its_users_and_a_private_one_does_not() -> None:
    pool = PagePool(2)
    private, published = pool.allocate(), pool.allocate()
    pool.publish(published, key(1))
    pool.release(private)
    pool.release(published)
    assert pool.find(key(1)) == published and pool.is_idle(published)
    assert not pool.is_idle(private) and pool.num_available == 2


def test_free_pages_go_before_idle_ones_and_the_longest_unused_before_others() -> None:
    pool = PagePool(5)
    pages = idle_pages(pool, range(3))
    pool.share(pages[0])
    pool.release(pages[0])  # now the last
    assert {pool.allocate() for _ in range(2)}.isdisjoint(pages)
    assert [pool.allocate() for _ in range(3)] == [pages[1], pages[2], pages[0]]
    assert [pool.find(key(i)) for i in range(3)] == [None] * 3


def test_a_shared_page_is_not_given_away() -> None:
    pool = PagePool(2)
    kept, _ = idle_pages(pool, range(2))
    pool.share(kept)
    assert pool.allocate() != kept
    with pytest.raises(IndexError):
        pool.allocate()


def test_of_two_pages_with_the_same_tokens_one_is_published() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, key(1))
    pool.publish(second, key(1))
    pool.release(second)
    assert pool.find(key(1)) == first and not pool.is_idle(second)


def test_a_promise_lasts_until_it_is_kept_or_its_page_released() -> None:
    pool = PagePool(2)
    kept, broken = pool.allocate(), pool.allocate()
    pool.promise(kept, key(1))
    pool.promise(broken, key(2))
    assert pool.is_promised(key(1)) and pool.find(key(1)) is None
    pool.publish(kept, key(1))
    pool.release(broken)
    assert not pool.is_promised(key(1)) and not pool.is_promised(key(2))
    assert pool.find(key(1)) == kept and pool.find(key(2)) is None


def test_a_promise_is_not_broken_by_who_repeats_it() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.promise(first, key(1))
    pool.promise(second, key(1))
    pool.release(second)
    assert pool.is_promised(key(1))
    pool.release(first)
    assert not pool.is_promised(key(1))


def test_forgetting_frees_every_page_and_waits_for_none() -> None:
    pool = PagePool(3)
    pages = idle_pages(pool, range(2))
    pool.share(pages[1])
    with pytest.raises(ValueError, match="1 pages are in use"):
        pool.forget()
    pool.release(pages[1])
    pool.forget()
    assert not any(map(pool.is_idle, range(3))) and pool.find(key(0)) is None and pool.num_available == 3


class Model:
    """What a pool should be, in the plainest form: users of every page, keys, and the order of last use."""

    def __init__(self, num_pages: int) -> None:
        self.users = Counter(dict.fromkeys(range(num_pages), 0))
        self.published: dict[bytes, int] = {}
        self.promised: dict[bytes, int] = {}
        self.unused: list[int] = []

    def check(self, pool: PagePool, keys: list[bytes]) -> None:
        for page, users in self.users.items():
            assert pool.num_users(page) == users
            assert pool.is_idle(page) == (page in self.unused)
        assert pool.num_available == sum(users == 0 for users in self.users.values())
        assert [pool.find(k) for k in keys] == [self.published.get(k) for k in keys]
        assert [pool.is_promised(k) for k in keys] == [k in self.promised for k in keys]

    def step(self, pool: PagePool, rng: random.Random, keys: list[bytes]) -> None:
        private = [p for p, n in self.users.items() if n == 1 and p not in self.published.values()]
        action = rng.choice(["allocate", "allocate", "share", "release", "release", "publish", "promise"])
        if action == "allocate" and pool.num_available:
            self.allocate(pool.allocate())
        elif action == "share" and self.published:
            page = rng.choice(list(self.published.values()))
            pool.share(page)
            self.users[page] += 1
            self.unused = [p for p in self.unused if p != page]
        elif action == "release" and any(self.users.values()):
            self.release(pool, rng.choice([p for p, n in self.users.items() if n]))
        elif action == "publish" and private:
            page, k = rng.choice(private), rng.choice(keys)
            pool.publish(page, k)
            self.promised = {q: p for q, p in self.promised.items() if p != page}
            self.published.setdefault(k, page)
        elif action == "promise" and (private := [p for p in private if p not in self.promised.values()]):
            page, k = rng.choice(private), rng.choice(keys)
            pool.promise(page, k)
            if k not in self.published:
                self.promised.setdefault(k, page)

    def allocate(self, page: int) -> None:
        is_free = self.users[page] == 0 and page not in self.unused
        assert is_free or page == self.unused.pop(0), "neither free nor the longest unused"
        assert is_free or all(n or p in [page, *self.unused] for p, n in self.users.items()), "a page was free"
        self.published = {k: p for k, p in self.published.items() if p != page}
        self.users[page] = 1

    def release(self, pool: PagePool, page: int) -> None:
        pool.release(page)
        self.users[page] -= 1
        if not self.users[page]:
            self.promised = {k: p for k, p in self.promised.items() if p != page}
            if page in self.published.values():
                self.unused.append(page)


@_settings
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32))
def test_any_history_leaves_what_the_plainest_pool_would(num_pages: int, num_keys: int, seed: int) -> None:
    pool, model, rng = PagePool(num_pages), Model(num_pages), random.Random(seed)
    keys = [key(i) for i in range(num_keys)]
    for _ in range(120):
        model.step(pool, rng, keys)
        model.check(pool, keys)
    for page, users in dict(model.users).items():
        for _ in range(users):
            model.release(pool, page)
    model.check(pool, keys)
    assert pool.num_available == num_pages and not any(pool.is_promised(k) for k in keys)
