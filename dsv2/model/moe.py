"""DeepSeekMoE (DeepSeek-V2 section 2.2): router, routed experts, shared experts.

Routing is computed in fp32 over all experts; gates are not renormalised unless the configuration says so (GShard,
Mixtral). No token is dropped here, and no balance loss is added: see `balance`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.config import ModelConfig, MoEConfig
from dsv2.model.balance import rows_by_expert
from dsv2.model.context import Context, Routing
from dsv2.model.layers import SwiGLU


def route(h_TD: Tensor, weight_ED: Tensor, moe: MoEConfig) -> Routing:
    """Choose A experts a token (equations 20 to 22, and section 2.2.2 for groups). Ties go to the lowest index."""
    scores_TE = F.linear(h_TD.float(), weight_ED.float()).softmax(-1)
    eligible_TE = scores_TE
    if moe.router == "group_limited_greedy":
        eligible_TE = scores_TE.masked_fill(~_best_groups(scores_TE, moe), float("-inf"))
    elif moe.router != "greedy":
        raise ValueError(f"moe.router={moe.router!r} must be 'greedy' or 'group_limited_greedy'")
    experts_TA = _top(eligible_TE, moe.experts_per_token)
    gates_TA = scores_TE.gather(1, experts_TA)
    if moe.norm_topk_prob and moe.experts_per_token > 1:
        # As in the official code, renormalised gates are not scaled.
        gates_TA = gates_TA / gates_TA.sum(-1, keepdim=True)
    else:
        gates_TA = gates_TA * moe.routed_scaling_factor
    return Routing(scores_TE, experts_TA, gates_TA)


def _best_groups(scores_TE: Tensor, moe: MoEConfig) -> Tensor:
    """Which experts lie in the token's best groups, [T, E] bool. NOTE: a group scores its maximum; V3 sums two."""
    group_scores_TG = scores_TE.unflatten(1, (moe.num_groups, -1)).amax(-1)
    best_TM = _top(group_scores_TG, moe.groups_per_token)
    mask_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TM, True)
    return mask_TG.repeat_interleave(moe.num_experts // moe.num_groups, dim=1)


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest, the lowest index first among equals (`topk` promises no order)."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


class _Permute(torch.autograd.Function):
    """Rows in another order. A permutation's backward is a gather too: no atomics, so bits repeat."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


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

    def forward(self, h_TD: Tensor, experts_TA: Tensor, gates_TA: Tensor) -> Tensor:
        """Sum over a token's experts of gate * expert(h), combined in fp32. [T, D]."""
        T, A = experts_TA.shape
        expert_M = experts_TA.flatten()
        order_M = expert_M.argsort(stable=True)
        inverse_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(T * A, device=h_TD.device))
        ends_E = rows_by_expert(experts_TA, len(self.down_proj)).cumsum(0).to(torch.int32)
        rows_MD = _Permute.apply(h_TD.repeat_interleave(A, dim=0), order_M, inverse_M)
        out_MD = _Permute.apply(self._swiglu(rows_MD, ends_E), inverse_M, order_M)
        return (out_MD.unflatten(0, (T, A)).float() * gates_TA[:, :, None]).sum(1).to(h_TD.dtype)

    def _swiglu(self, rows_MD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert through their expert; expert e owns rows ends[e-1]:ends[e]."""
        gate_MF, up_MF = F.grouped_mm(rows_MD, self.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, -1)
        return F.grouped_mm(F.silu(gate_MF) * up_MF, self.down_proj.transpose(1, 2), offs=ends_E)


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
        routing = route(h_TD, self.gate.weight, self.moe)
        if context.routings is not None:
            context.routings.append(routing)
        out_TD = self.experts(h_TD, routing.experts_TA, routing.gates_TA)
        return out_TD + self.shared_experts(h_TD) if self.moe.num_shared_experts else out_TD
