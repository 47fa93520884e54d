"""Decode steps of fixed shape: as many rows as the next larger of a list of sizes, which a CUDA graph replays.

A graph is captured when its size is first needed, so an engine starts at once. On a CPU the same padded step runs
without a graph, which is how it is tested. This room draws no token and knows no request.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv2.device import to_device
from dsv2.model import Context, Transformer

KNOWN, SOURCE, POSITION, SLOT, LENGTH = range(5)
"""What `numbers` say of every row: its token's id, or (where not -1) which id of the step before it is; its position;
page * 64 + offset where it is written; how many tokens it sees."""


def token_ids(known: Tensor | int, source_T: Tensor, previous_ids: Tensor) -> Tensor:
    """[T] int64: `previous_ids`[source_T], and `known` where the source is -1."""
    return torch.where(source_T < 0, known, previous_ids[source_T.clamp(min=0)])


class FixedDecoder:
    """Runs rows that each continue a history in the cache, through buffers of every size in `sizes` (ascending).

    `previous_ids` [N] int64 on the device: what `SOURCE` refers to. No history has more than `max_pages` pages.
    """

    def __init__(
        self,
        model: Transformer,
        layers: abc.Sequence[Tensor],
        previous_ids: Tensor,
        sizes: abc.Sequence[int],
        max_pages: int,
    ) -> None:
        self.model, self.layers, self.previous_ids = model, layers, previous_ids
        self.sizes, self.max_pages = sizes, max_pages
        self._steps: dict[int, _FixedStep] = {}
        has_graphs = model.device.type == "cuda" and len(sizes) > 0
        self._pool = torch.cuda.graph_pool_handle() if has_graphs else None
        self.side_stream = torch.cuda.Stream(model.device) if has_graphs else None

    def fits(self, num_rows: int) -> bool:
        return bool(self.sizes) and num_rows <= self.sizes[-1]

    def run(self, numbers: np.ndarray, page_table: np.ndarray) -> Tensor:
        """Normalised hidden states [R, D] of R rows, `numbers` [5, R] int64 and `page_table` [R, P] int32.

        They are overwritten by the next step of the same size.
        """
        num_rows = len(page_table)
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        step = self._steps.get(size) or _FixedStep(self, size)
        self._steps[size] = step
        step.load(numbers, page_table)
        return step.run(self._pool)[:num_rows]


class _FixedStep:
    """Buffers of one size, and the graph over them."""

    def __init__(self, decoder: FixedDecoder, size: int) -> None:
        device = decoder.model.device
        self.decoder = decoder
        self.numbers = torch.zeros((5, size), dtype=torch.int64, device=device)
        self.page_table = torch.zeros((size, decoder.max_pages), dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor | None = None

    def load(self, numbers: np.ndarray, page_table: np.ndarray) -> None:
        num_rows, num_pages = page_table.shape
        padded = np.zeros((5, self.numbers.shape[1]), dtype=np.int64)
        padded[:, :num_rows] = numbers
        padded[SOURCE, num_rows:] = padded[SLOT, num_rows:] = -1
        self.numbers.copy_(to_device(padded, self.numbers.device))
        self.page_table[:num_rows, :num_pages] = to_device(page_table, self.numbers.device)

    def run(self, pool: Any) -> Tensor:
        if pool is None:
            return self._compute()
        if self.graph is None:
            self._compute()  # what is compiled or cached at the first call must not be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.hidden = self._compute()
            self.graph = graph
            # Capturing collects garbage; what is left then stays, and would be looked through, 0.1 s and more, each
            # time that the objects of passing steps have added up.
            gc.freeze()
        self.graph.replay()
        assert self.hidden is not None
        return self.hidden

    def _compute(self) -> Tensor:
        model, numbers = self.decoder.model, self.numbers
        tokens = token_ids(numbers[KNOWN], numbers[SOURCE], self.decoder.previous_ids)
        context = Context.decode(
            self.decoder.layers,
            numbers[SLOT],
            self.page_table,
            numbers[POSITION],
            numbers[LENGTH].to(torch.int32),
            model.cfg.num_heads,
        )
        context.side_stream = self.decoder.side_stream
        return model.model(tokens, context)
