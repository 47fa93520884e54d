"""Token dropping by device capacity (DeepSeek-V2 section 2.2.4), which only a training step asks for.

The paper does not say over which tokens the average load is taken: here over all rows of a forward pass. A dropped row
keeps its place and gets gate 0, and so adds exactly nothing to the output and to any gradient; its product is still
computed. Whoever sends rows to devices need not send those.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsv2.model.context import Dropping, Routing


def drop_rows(routing: Routing, dropping: Dropping, num_groups: int) -> Routing:
    """Drop what exceeds the capacity of each of the `num_groups` devices, those of lowest affinity first.

    A device takes capacity_factor times the mean load, rounded up: ceil(factor * T * A / G) rows, a row being one token
    at one of its experts. Rows of exempt tokens stay, and are counted first. Among rows of equal score the first stay.

    Returns the routing with `kept_TA`, and gates of 0 where a row was dropped. The host does not wait for the device.
    """
    T, A = routing.experts_TA.shape
    capacity = math.ceil(dropping.capacity_factor * T * A / num_groups)
    exempt_TA = dropping.exempt_T[:, None].expand(T, A)
    affinity_TA = routing.scores_TE.detach().gather(1, routing.experts_TA).masked_fill(exempt_TA, math.inf)
    groups_TA = routing.groups_TA(num_groups)
    kept_TA = exempt_TA | (_ranks(affinity_TA.flatten(), groups_TA.flatten(), num_groups).view(T, A) < capacity)
    return dataclasses.replace(routing, gates_TA=routing.gates_TA.masked_fill(~kept_TA, 0.0), kept_TA=kept_TA)


def _ranks(affinity_M: Tensor, groups_M: Tensor, num_groups: int) -> Tensor:
    """How many rows of the same group come before each row, [M]: those of higher affinity, and of equal, earlier ones.

    By two stable sorts, which leave the rows of a group side by side and the best first.
    """
    order_M = affinity_M.sort(descending=True, stable=True).indices
    order_M = order_M[groups_M[order_M].sort(stable=True).indices]
    sorted_M = groups_M[order_M]
    starts_G = torch.searchsorted(sorted_M, torch.arange(num_groups, device=groups_M.device))
    places_M = torch.arange(len(groups_M), device=groups_M.device)
    return torch.empty_like(places_M).scatter_(0, order_M, places_M - starts_G[sorted_M])


def drop_rate(routing: Routing) -> Tensor:
    """Share of the routed rows that were dropped, fp32."""
    if routing.kept_TA is None:
        return torch.zeros((), device=routing.scores_TE.device)
    return 1.0 - routing.kept_TA.float().mean()
