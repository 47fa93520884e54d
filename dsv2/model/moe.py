"""DeepSeekMoE (DeepSeek-V2 section 2.2): router, routed experts, shared experts.

Routing is computed in fp32 over all experts; gates are not renormalised unless the configuration says so (GShard,
Mixtral). Rows are dropped only where the context says so, see `dropping`; balance losses are added nowhere here: see
`balance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv2.config import ModelConfig, MoEConfig
from dsv2.kernels.grouped_mlp import grouped_mlp
from dsv2.kernels.route import route as choose_experts
from dsv2.model.context import Context, Routing
from dsv2.model.dropping import drop_rows
from dsv2.model.layers import SwiGLU


def route(h_TD: Tensor, weight_ED: Tensor, moe: MoEConfig) -> Routing:
    """Choose A experts a token (equations 20 to 22, and section 2.2.2 for groups). Ties go to the lowest index.

    NOTE: a group scores its maximum; V3 sums two.
    """
    num_groups, groups_per_token = moe.device_limit
    decided = choose_experts(
        h_TD,
        weight_ED,
        experts_per_token=moe.experts_per_token,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalize=moe.norm_topk_prob,
        scaling=moe.routed_scaling_factor,
    )
    return Routing(*decided)


class Router(nn.Module):
    """The centroids e_i, one row an expert, without bias."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))


class Experts(nn.Module):
    """Routed experts, packed: gate and up projections [E, 2F, D], down projections [E, D, F]."""

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__()
        if dim % 8 or width % 8:
            # Grouped products want rows of whole 16 bytes, in 16-bit types too.
            raise ValueError(f"hidden_size={dim} and moe.expert_intermediate_size={width} must be multiples of 8")
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))

    def forward(
        self,
        h_TD: Tensor,
        experts_TA: Tensor,
        gates_TA: Tensor,
        shared_TD: Tensor | Callable[[], Tensor] | None = None,
        block_counts: Tensor | None = None,
    ) -> Tensor:
        """shared + sum over a token's experts of gate * expert(h), added in fp32. [T, D]."""
        return grouped_mlp(h_TD, experts_TA, gates_TA, self.gate_up_proj, self.down_proj, shared_TD, block_counts)


class MoE(nn.Module):
    """Routed experts plus shared experts, which are one SwiGLU, ungated. [T, D] to [T, D]."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Router(moe.num_experts, cfg.hidden_size)
        self.experts = Experts(moe.num_experts, cfg.hidden_size, moe.expert_intermediate_size)
        if moe.num_shared_experts:
            self.shared_experts = SwiGLU(cfg.hidden_size, moe.shared_intermediate_size)

    def forward(self, h_TD: Tensor, context: Context) -> Tensor:
        shared = self._shared(h_TD, context.side_stream)
        routing = route(h_TD, self.gate.weight, self.moe)
        if context.dropping is not None:
            routing = drop_rows(routing, context.dropping, self.moe.device_limit[0])
        if context.routings is not None:
            context.routings.append(routing)
        return self.experts(h_TD, routing.experts_TA, routing.gates_TA, shared, routing.block_counts)

    def _shared(self, h_TD: Tensor, stream: torch.cuda.Stream | None) -> Tensor | Callable[[], Tensor] | None:
        """What the shared experts make of h; with a `stream`, begun on it, and waited for by the call that gives it."""
        if not self.moe.num_shared_experts:
            return None
        if stream is None:
            return self.shared_experts(h_TD)
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            shared_TD = self.shared_experts(h_TD)

        def joined() -> Tensor:
            current.wait_stream(stream)
            return shared_TD

        return joined
