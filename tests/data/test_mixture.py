"""Claims about mixtures: each group gets its share to within a document, and no document more than its epochs."""

import numpy as np
import pytest

from dsv2.config.data import MixtureConfig
from dsv2.data.mixture import count_copies

NAMES = ["web", "books", "code"]
_RNG = np.random.default_rng(0)
GROUPS = _RNG.integers(0, 3, 3000)
TOKENS = _RNG.integers(10, 500, 3000)
LOTS = _RNG.integers(0, 2**64, 3000, dtype=np.uint64)
WEIGHTS = {"web": 5.0, "books": 3.0, "code": 2.0}


def mixed(**changes) -> np.ndarray:
    cfg = MixtureConfig(**({"by": "source", "weights": WEIGHTS} | changes))
    return count_copies(NAMES, GROUPS, TOKENS, LOTS, cfg)


def used(copies: np.ndarray) -> np.ndarray:
    return np.bincount(GROUPS, TOKENS * copies)


AVAILABLE = used(np.ones(3000, np.int64))


@pytest.mark.parametrize("tokens", [1000, 100_000, 900_000])
def test_each_group_gets_its_share_to_within_a_document(tokens):
    missing = tokens * np.array([0.5, 0.3, 0.2]) - used(mixed(tokens=tokens))
    assert (missing >= -1).all()
    assert (missing < TOKENS.max() + 1).all()


def test_copies_of_a_groups_documents_differ_by_one_at_most():
    copies = mixed(tokens=900_000)
    for group in range(3):
        members = copies[group == GROUPS]
        assert members.max() - members.min() <= 1
    assert copies.max() > 1


def test_without_a_total_the_scarcest_group_is_used_once_and_none_twice():
    copies = mixed(weights={"web": 1.0, "books": 1.0, "code": 4.0})
    assert (copies[GROUPS == 2] == 1).all()
    assert copies.max() == 1
    assert np.abs(used(copies)[:2] - AVAILABLE[2] / 4).max() < TOKENS.max()


def test_by_none_takes_every_document_once():
    assert (count_copies(NAMES, GROUPS, TOKENS, LOTS, MixtureConfig()) == 1).all()


def test_a_bigger_total_takes_no_document_away():
    small, large = mixed(tokens=100_000), mixed(tokens=400_000)
    assert (large >= small).all()


def test_too_many_epochs_are_refused_with_group_and_numbers():
    with pytest.raises(ValueError, match=r"mixture\.tokens=9,000,000 wants 4,500,000 tokens of source 'web'.*=4\.0"):
        mixed(tokens=9_000_000)


@pytest.mark.parametrize(("weights", "name"), [({"web": 1.0, "books": 1.0}, "code"), (WEIGHTS | {"law": 1.0}, "law")])
def test_weights_that_do_not_fit_the_groups_are_refused(weights, name):
    names = [*NAMES, "law"]
    with pytest.raises(ValueError, match=rf"mixture\.weights\.{name}: .* tokens of this source are left"):
        count_copies(names, GROUPS, TOKENS, LOTS, MixtureConfig(by="source", weights=weights))
