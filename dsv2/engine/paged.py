"""Models and the pages that they read and write: a batch's rows in, their hidden states out.

Several models may lie over the same page numbers, each with layers of its own there: a model and the one that drafts
for it. This room draws no token.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from dsv2.config.counts import kv_elements_per_token
from dsv2.config.engine import PAGE_SIZE, EngineConfig
from dsv2.device import to_device
from dsv2.engine.batch import Batch
from dsv2.engine.decode import FixedDecoder, token_ids
from dsv2.model import Context, Transformer

CPU_CACHE_BYTES = 10**9
"""What the cache may take on the CPU where nobody says how many pages it has."""


def page_bytes(*models: Transformer) -> int:
    """Bytes of a page, all layers of all models together."""
    return sum(PAGE_SIZE * kv_elements_per_token(model.cfg) * model.dtype.itemsize for model in models)


def default_num_pages(config: EngineConfig, *models: Transformer) -> int:
    """As many pages as the sequences of `config` can ever need, or as there is memory for, of all models together.

    Raises ValueError where there is no room for one.
    """
    needed = config.max_num_seqs * -(-config.max_model_len // PAGE_SIZE)
    budget_bytes, device = CPU_CACHE_BYTES, models[0].device
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget_bytes = int(config.gpu_memory_utilization * total_bytes) - (total_bytes - free_bytes)
    num_pages = min(needed, budget_bytes // page_bytes(*models))
    if num_pages < 1:
        raise ValueError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} leaves {budget_bytes / 2**20:.0f} MiB for the "
            f"cache, expected at least a page of {page_bytes(*models) / 2**20:.1f} MiB on {device}"
        )
    return num_pages


def allocate_pages(num_pages: int, *models: Transformer) -> list[Tensor]:
    """Pages [L, num_pages, 64, X] of every model in its dtype, side by side in one allocation, with anything in them.

    Raises ValueError that says what would fit where a GPU has no room for them.
    """
    device = models[0].device
    try:
        all_bytes = torch.empty(num_pages * page_bytes(*models), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free_bytes, _ = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"num_pages={num_pages} of {page_bytes(*models) / 2**20:.1f} MiB are more than {device} has free: "
            f"num_pages={free_bytes // page_bytes(*models)} would fit"
        ) from error
    bounds = accumulate((num_pages * page_bytes(model) for model in models), initial=0)
    return [
        all_bytes[start:stop].view(model.dtype).view(model.cfg.num_layers, num_pages, PAGE_SIZE, -1)
        for model, (start, stop) in zip(models, pairwise(bounds), strict=True)
    ]


class PagedModel:
    """A model in its own dtype, with its own parameters, over pages of `allocate_pages`.

    `ids` [N] int64 on the device: what a batch's `sources` refer to.
    """

    def __init__(self, model: Transformer, cache_LPX: Tensor, ids: Tensor, config: EngineConfig) -> None:
        model.join_projections()
        self.model, self.can_absorb = model, model.cfg.attention.kind == "mla"
        self._layers, self._ids = cache_LPX.unbind(), ids
        sizes = config.graph_sizes(model.device.type) if self.can_absorb else ()
        max_pages = -(-config.max_model_len // PAGE_SIZE)
        self._decoder = FixedDecoder(model, self._layers, ids, sizes, max_pages)

    def hidden(self, batch: Batch) -> Tensor:
        """Normalised hidden states [T, D] of the batch's rows, which may be overwritten by the next call."""
        known_T, sources_T = batch.tokens
        if batch.is_decode and self._decoder.fits(len(known_T)):
            histories, table = batch.histories()
            return self._decoder.run(np.vstack((known_T, sources_T, histories)), table)
        device = self.model.device
        tokens_T = to_device(known_T, device)
        if (sources_T >= 0).any():
            tokens_T = token_ids(tokens_T, to_device(sources_T, device), self._ids)
        context = Context.cached(
            self._layers,
            torch.from_numpy(batch.page_table()),
            batch.starts.tolist(),
            batch.counts.tolist(),
            self.model.cfg.num_heads,
            batch.num_absorbed,
        )
        return self.model.model(tokens_T, context)
