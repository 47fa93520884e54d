"""Packed training batches: the token stream cut into windows, shuffled by (seed, epoch), resumable anywhere.

Section 3.1.2 of the paper gives batch size and sequence length; packing and masking it does not disclose.
This room does not open files, move tensors to a device or ramp the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv2.data.shards import TokenShards

# What cross entropy skips: torch's default ignore_index.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows of S tokens side by side, T = B * S rows.

    tokens: [T] int64.
    targets: [T] int64, the next token of the same document; IGNORED at a document's last token.
    cu_seqlens: [num_segments + 1] int32, from 0 to T. A segment is a document's part of one window.
    sequence_ids: [B] int64, which window of the stream each sequence is: tokens id * S to (id + 1) * S.
    """

    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    sequence_ids: np.ndarray


class BatchLoader:
    """Endless batches of windows, in an order that neither the batch size nor the number of ranks changes.

    The stream of all documents is cut into `num_windows` windows of `sequence_length` tokens; the rest, which
    fills no window, is dropped. Each epoch passes every window once, in an order made from (seed, epoch);
    a batch may straddle two epochs. Rank r gets the r-th contiguous part of each global batch.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """`batch_sequences` is the global batch, in windows.

        Raises ValueError for too few tokens for one window and for a batch that ranks cannot share equally.
        """
        if sequence_length < 1 or batch_sequences < 1 or seed < 0:
            raise ValueError(
                "expected sequence_length >= 1, batch_sequences >= 1 and seed >= 0, "
                f"got {sequence_length=}, {batch_sequences=} and {seed=}"
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank={rank} must lie in 0..num_ranks - 1 with num_ranks={num_ranks}")
        if batch_sequences % num_ranks:
            raise ValueError(f"batch_sequences={batch_sequences} must be divisible by num_ranks={num_ranks}")
        if shards.num_tokens < sequence_length:
            raise ValueError(
                f"{shards.num_tokens} tokens are too few for a window of sequence_length={sequence_length}"
            )
        self.num_windows = shards.num_tokens // sequence_length
        self._shards = shards
        self._document_stops = np.append(shards.document_starts[1:], shards.num_tokens)
        self._sequence_length = sequence_length
        self._batch_sequences = batch_sequences
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks
        self._sequences_seen = 0
        # The epoch whose order is at hand: none yet, since load_state may begin at any.
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next(self) -> Batch:
        """This rank's part of the next global batch."""
        share = self._batch_sequences // self._num_ranks
        first = self._sequences_seen + self._rank * share
        batch = self._pack(self._window_ids(np.arange(first, first + share)))
        self._sequences_seen += self._batch_sequences
        return batch

    def state(self) -> dict[str, int]:
        """The position, for JSON. Counts sequences of all ranks: any batch size and rank count can resume."""
        return {"sequences_seen": self._sequences_seen, **self._stream()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with the first window that the loader which gave `state` had not passed.

        Raises ValueError when it had another seed, sequence length or number of tokens, so another order.
        """
        for name, value in self._stream().items():
            if state.get(name) != value:
                raise ValueError(f"saved data position: {name}={state.get(name)}; this run has {value}")
        seen = state.get("sequences_seen")
        if not isinstance(seen, int) or seen < 0:
            raise ValueError(f"saved data position: sequences_seen={seen}; expected a count")
        self._sequences_seen = seen

    def _stream(self) -> dict[str, int]:
        """What the order of windows depends on."""
        return {
            "seed": self._seed,
            "sequence_length": self._sequence_length,
            "num_tokens": self._shards.num_tokens,
        }

    def _window_ids(self, positions: np.ndarray) -> np.ndarray:
        """The windows at these places, [B] int64, of the endless sequence of epochs."""
        epochs, places = np.divmod(positions, self.num_windows)
        return np.concatenate([self._epoch_order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _permutation(self._seed, epoch, self.num_windows)
        return self._order

    def _pack(self, window_ids: np.ndarray) -> Batch:
        tokens = np.empty((len(window_ids), self._sequence_length), np.int64)
        targets = np.empty_like(tokens)
        stops = [np.zeros(1, np.int64)]
        for i, window_id in enumerate(window_ids.tolist()):
            stops.append(i * self._sequence_length + self._fill(window_id, tokens[i], targets[i]))
        cu_seqlens = np.concatenate(stops).astype(np.int32)
        return Batch(tokens.reshape(-1), targets.reshape(-1), cu_seqlens, window_ids)

    def _fill(self, window_id: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Write one window's rows, [S] each; return where its segments stop, counted from its first row."""
        start, length = window_id * self._sequence_length, self._sequence_length
        # One token more, for the last target; the stream's very last token, an eos, has nothing to predict.
        stream = self._shards.tokens(start, min(start + length + 1, self._shards.num_tokens))
        tokens[:] = stream[:length]
        targets[: len(stream) - 1] = stream[1:]
        first, last = np.searchsorted(self._document_stops, (start, start + length), side="right")
        stops = self._document_stops[first:last] - start
        targets[stops - 1] = IGNORED
        return stops if len(stops) and stops[-1] == length else np.append(stops, length)


def _permutation(seed: int, epoch: int, num_windows: int) -> np.ndarray:
    """The order of an epoch, [num_windows] int64.

    Sorts the raw output of PCG64, which numpy keeps the same over its versions, as it does not for
    `Generator.permutation`: a run resumed under another numpy must not see windows twice.
    """
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_windows), kind="stable")
