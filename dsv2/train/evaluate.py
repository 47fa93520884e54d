"""Held-out bits per byte: comparable between tokenizers, and with compressors on the same documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dsv2.data.batches import IGNORED
from dsv2.data.shards import TokenShards
from dsv2.kernels.cross_entropy import cross_entropy
from dsv2.model import Context, Transformer


@dataclass(slots=True)
class SourceScore:
    """Sums over the documents of one source."""

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    shards: TokenShards,
    *,
    window: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
) -> dict[str, SourceScore]:
    """Score every document of every source; each token after the first is predicted once.

    A document longer than `window` tokens is scored by windows that start `stride` apart (default: `window`, no
    overlap); a later window scores only what the earlier did not reach. `max_tokens` cuts each source after so many
    tokens; the bytes of a cut document count in proportion.
    """
    stride = window if stride is None else stride
    if not 0 < stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}")
    scores: dict[str, SourceScore] = {}
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    source_of_pending: list[str] = []

    def flush() -> None:
        for source, nats in zip(source_of_pending, _score_windows(model, pending), strict=True):
            scores[source].nats += nats
        pending.clear()
        source_of_pending.clear()

    for source, num_bytes, tokens in shards.documents():
        score = scores.setdefault(source, SourceScore())
        room = len(tokens) if max_tokens is None else min(len(tokens), max_tokens - score.num_tokens)
        if room < 2:
            continue
        score.num_tokens += room
        score.num_bytes += num_bytes * room / len(tokens)
        for inputs, targets in _windows(tokens[:room], window, stride):
            pending.append((inputs, targets))
            source_of_pending.append(source)
            if sum(len(x) for x, _ in pending) >= batch_tokens:
                flush()
    flush()
    return scores


def _windows(tokens: np.ndarray, window: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) of at most `window` rows; targets already scored are ignored."""
    num_targets = len(tokens) - 1
    done = 0
    start = 0
    while done < num_targets:
        stop = min(start + window, num_targets)
        targets = tokens[start + 1 : stop + 1].copy()
        targets[: done - start] = IGNORED
        yield tokens[start:stop], targets
        done = stop
        start = max(stop - (window - stride), 0)


def _score_windows(model: Transformer, windows: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Nats of each window, all windows in one packed pass."""
    if not windows:
        return []
    bounds = np.cumsum([0, *(len(x) for x, _ in windows)])
    tokens_T, targets_T = (torch.from_numpy(np.concatenate(xs)).to(model.device) for xs in zip(*windows, strict=True))
    context = Context.packed(bounds.tolist(), model.device)
    hidden_TD = model.model(tokens_T, context)
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    sums = [cross_entropy(hidden_TD[s], model.head_weight, targets_T[s], ignore_index=IGNORED) for s in spans]
    return torch.stack(sums).tolist()
