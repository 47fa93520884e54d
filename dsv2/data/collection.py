"""All parts together: duplicates over all of them, what is held out, how often each document is used, the shards.

The paper's section 3.1.1 names the tokenizer and the share of Chinese; docs/data.md says what is done here.
This room reads no text: a document is its row in a part's table and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv2.config.data import LANGUAGES
from dsv2.data.dedup import EXACT, NEAR, UNIQUE, find_duplicates, lots
from dsv2.data.filters import REASONS
from dsv2.data.mixture import count_copies
from dsv2.data.parts import FinishedPart, Preparation
from dsv2.data.shards import ShardWriter

OUTCOMES = (*REASONS, "exact_duplicate", "near_duplicate", "kept")
_KINDS = {EXACT: "exact_duplicate", NEAR: "near_duplicate", UNIQUE: "kept"}
_MAX_EXAMPLES = 3
_TELL_EVERY = 1000


class Collection:
    """The N documents that passed the filters, in order of source, part and place.

    `kinds` [N] uint8 is UNIQUE, EXACT or NEAR; `held_out` [N] and `copies` [N] int64 say how often each goes where.
    """

    def __init__(self, preparation: Preparation) -> None:
        """Raises ValueError for a damaged part, no documents to train on, and a mixture that cannot be had."""
        self._config, self._tokenizer = preparation.config, preparation.tokenizer
        self._names = [source.name for source in self._config.sources]
        self._part_sources = [self._names.index(part.source.name) for part in preparation.parts]
        self._parts = [FinishedPart.open(folder, preparation.row_dtype) for folder in preparation.folders]
        self._sources = np.repeat(self._part_sources, [len(part.rows) for part in self._parts])
        self._languages, self._tokens, self._bytes, digests = (
            np.concatenate([part.rows[name] for part in self._parts])
            for name in ("language", "tokens", "bytes", "digest")
        )
        self.kinds = np.zeros(len(digests), np.uint8)
        if self._config.dedup.method != "none":
            self.kinds = find_duplicates(digests, self._bands(preparation.row_dtype["bands"].shape[0]))
        self.held_out, self.copies = self._choose(digests)

    def _bands(self, num_bands: int) -> Iterator[np.ndarray]:
        for band in range(num_bands):
            yield np.concatenate([part.rows["bands"][:, band] for part in self._parts])

    def _choose(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cfg, unique = self._config, self.kinds == UNIQUE
        held_out = unique & (lots(digests, "held out") < cfg.held_out_fraction * 2**64)
        left = np.flatnonzero(unique & ~held_out)
        if not len(left):
            raise ValueError(f"no document is left to train on, of {len(unique):,} that passed the filters")
        names, groups = self._groups()
        copies = np.zeros(len(unique), np.int64)
        chances = lots(digests[left], f"mixture {cfg.seed}")
        copies[left] = count_copies(names, groups[left], self._tokens[left], chances, cfg.mixture)
        return held_out.astype(np.int64), copies

    def _groups(self) -> tuple[list[str], np.ndarray]:
        """What the mixture weighs: names, and each document's place among them."""
        if self._config.mixture.by == "language":
            return list(LANGUAGES), self._languages.astype(np.int64)
        return self._names, self._sources

    def write(self, folder: Path, copies: np.ndarray, progress: Callable[[int, int], object]) -> None:
        """Shards in the new folder: all documents that have a copy, then those that have two, and so on."""
        folder.mkdir()
        writer = ShardWriter(folder, self._tokenizer, self._config.shard_tokens)
        total = int(copies.sum())
        starts = np.cumsum([0, *(len(part.rows) for part in self._parts)])
        for epoch in range(int(copies.max())):
            for part, start, stop in zip(self._parts, starts, starts[1:], strict=False):
                for place in np.flatnonzero(copies[start:stop] > epoch):
                    writer.add(*part.tokens.document(int(place)))
                    if writer.num_documents % _TELL_EVERY == 0:
                        progress(writer.num_documents, total)
        writer.finish()
        progress(total, total)

    def report(self) -> dict[str, Any]:
        """`report.json`: what was read, dropped and why, kept, held out and used, by source and language."""
        outcomes = [self._outcomes_of(source) for source in range(len(self._names))]
        used = self._tokens * self.copies
        return {
            "config": self._config.to_dict(),
            "outcomes": [row for rows in outcomes for row in rows],
            "mixture": [
                self._share(source, language)
                for source in range(len(self._names))
                for language in range(len(LANGUAGES))
                if self._kept(source, language).any()
            ],
            "train": {"documents": int(self.copies.sum()), "tokens": int(used.sum())},
            "held_out": {
                "documents": int(self.held_out.sum()),
                "tokens": int((self._tokens * self.held_out).sum()),
            },
            "document_tokens": self._lengths(),
            "examples": self._examples(),
        }

    def _kept(self, source: int, language: int) -> np.ndarray:
        return (self.kinds == UNIQUE) & (self._sources == source) & (self._languages == language)

    def _outcomes_of(self, source: int) -> list[dict[str, Any]]:
        """Documents and bytes of one source by language and outcome, in the order of OUTCOMES."""
        totals: dict[tuple[str, str], list[int]] = {}
        for part, part_source in zip(self._parts, self._part_sources, strict=True):
            for row in part.summary["counts"] if part_source == source else ():
                if row["outcome"] != "kept":
                    counts = totals.setdefault((row["outcome"], row["language"]), [0, 0])
                    counts[0] += row["documents"]
                    counts[1] += row["bytes"]
        for kind, outcome in _KINDS.items():
            for language_idx, language in enumerate(LANGUAGES):
                found = (self.kinds == kind) & (self._sources == source) & (self._languages == language_idx)
                if found.any():
                    totals[outcome, language] = [int(found.sum()), int(self._bytes[found].sum())]
        ordered = sorted(totals.items(), key=lambda item: (OUTCOMES.index(item[0][0]), item[0][1]))
        return [
            {"source": self._names[source], "language": language, "outcome": outcome, "documents": n, "bytes": b}
            for (outcome, language), (n, b) in ordered
        ]

    def _share(self, source: int, language: int) -> dict[str, Any]:
        """What the training shards hold of one source and language."""
        members = self._kept(source, language) & (self.held_out == 0)
        available, used = self._tokens[members], self._tokens[members] * self.copies[members]
        return {
            "source": self._names[source],
            "language": LANGUAGES[language],
            "available_tokens": int(available.sum()),
            "tokens": int(used.sum()),
            "epochs": round(float(used.sum() / max(available.sum(), 1)), 4),
        }

    def _lengths(self) -> list[dict[str, int]]:
        """How many kept documents have fewer tokens than each power of two, and no fewer than the one before."""
        powers = np.ceil(np.log2(self._tokens[self.kinds == UNIQUE] + 1)).astype(np.int64)
        counts = np.bincount(powers)
        return [{"below": 2**power, "documents": int(count)} for power, count in enumerate(counts) if count]

    def _examples(self) -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = {}
        for part in self._parts:
            for reason, examples in part.summary["examples"].items():
                found[reason] = (found.get(reason, []) + examples)[:_MAX_EXAMPLES]
        return {reason: found[reason] for reason in REASONS if reason in found}
