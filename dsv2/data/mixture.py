"""How often each document goes into the shards, so that sources or languages get their shares of the tokens.

The paper discloses that Chinese tokens are about 12% more than English ones (section 3.1.1), and no other share.
This room counts; it moves no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv2.config.data import MixtureConfig


def count_copies(
    names: Sequence[str], groups: np.ndarray, tokens: np.ndarray, lots: np.ndarray, cfg: MixtureConfig
) -> np.ndarray:
    """Copies of each of N documents, [N] int64.

    A group gets its whole epochs, then the documents with the lowest lots while they fit: it falls short of its
    share by less than one document.

    Args:
        names: of the groups, sources or languages as `cfg.by` says.
        groups: [N] int64, each document's place in `names`; tokens: [N] int64; lots: [N] uint64.

    Raises:
        ValueError: for a group without a weight, a weight without documents, and tokens that would repeat a group
            more than `cfg.max_epochs` times.
    """
    if cfg.by == "none":
        return np.ones(len(groups), np.int64)
    available = np.bincount(groups, tokens, len(names))
    for name, count in zip(names, available, strict=True):
        if bool(count) != (name in cfg.weights):
            raise ValueError(
                f"mixture.weights.{name}: {count:,.0f} tokens of this {cfg.by} are left after filters and "
                "deduplication; expected a weight for each that has tokens, and for no other"
            )
    weights = np.array([cfg.weights.get(name, 0.0) for name in names])
    shares = weights / weights.sum()
    there = available > 0
    total = cfg.tokens or (available[there] / shares[there]).min()
    copies = np.zeros(len(groups), np.int64)
    for group in np.flatnonzero(there):
        members = np.flatnonzero(groups == group)
        wanted = round(total * shares[group])
        if wanted > cfg.max_epochs * available[group]:
            raise ValueError(
                f"mixture.tokens={cfg.tokens:,} wants {wanted:,} tokens of {cfg.by} {names[group]!r}, which has "
                f"{available[group]:,.0f}: more than max_epochs={cfg.max_epochs} times"
            )
        epochs, rest = divmod(wanted, int(available[group]))
        order = members[np.argsort(lots[members], kind="stable")]
        copies[order] = epochs
        copies[order[: np.searchsorted(tokens[order].cumsum(), rest, side="right")]] += 1
    return copies
