"""Small routers, and routings made of given or random logits."""

from __future__ import annotations

from typing import Any

import torch

from dsv2.config import MoEConfig
from dsv2.model.context import Routing
from dsv2.model.moe import route


def moe_config(**changes: Any) -> MoEConfig:
    fields: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2, "expert_intermediate_size": 16}
    return MoEConfig(**(fields | changes))


def route_logits(logits: list[list[float]], moe: MoEConfig) -> Routing:
    """Routing where row t's router logits are exactly the given ones."""
    return route(torch.tensor(logits), torch.eye(moe.num_experts), moe)


def random_routing(moe: MoEConfig, num_tokens: int = 65, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    return route(2 * torch.randn(num_tokens, moe.num_experts, generator=generator), torch.eye(moe.num_experts), moe)


def grouped_config(**changes: Any) -> MoEConfig:
    """Eight experts on four devices, of which a token reaches at most two, with three experts."""
    limit = {"router": "group_limited_greedy", "num_groups": 4, "groups_per_token": 2, "experts_per_token": 3}
    return moe_config(**(limit | changes))
