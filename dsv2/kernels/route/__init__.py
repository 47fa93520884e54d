"""The router of DeepSeekMoE (DeepSeek-V2 equations 20 to 22, and section 2.2.2 for groups), all in fp32."""

from __future__ import annotations

from torch import Tensor

from dsv2.kernels.backend import FLOATS, REFERENCE_FLOATS, check_dtype, check_same_device, check_shape, use_kernel
from dsv2.kernels.route.reference import ROUTE_BLOCK

__all__ = ["ROUTE_BLOCK", "route"]


def route(
    h: Tensor,
    weight: Tensor,
    *,
    experts_per_token: int,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalize: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores over all experts, the chosen experts of each token, their gates, and how often each was chosen.

    Args:
        h: [T, D], float32, float16 or bfloat16 (float64 in the reference); rows may be strided.
        weight: [E, D], the experts' centroids, of any of these dtypes.
        experts_per_token: A, chosen by score among the eligible experts.
        num_groups: the experts form so many groups of E / num_groups neighbours.
        groups_per_token: only experts of so many groups are eligible; a group scores the maximum of its experts.
        normalize: divide the gates by their sum (where A > 1); then, as in the official code, they are not scaled.
        scaling: otherwise, what the gates are multiplied by.

    Returns:
        scores: [T, E] float32, softmax(h @ weight.T).
        experts: [T, A] int64, best first; among equals, of experts and of groups, the lowest index.
        gates: [T, A] float32, the scores of the chosen, normalised or scaled.
        block_counts: [ceil(T / ROUTE_BLOCK), E] int32, how many of each ROUTE_BLOCK consecutive tokens chose expert e:
            what `permute.sort_rows` starts from.

    Differentiable in h and weight through scores and gates. A token's results depend on its row of h alone, bit for
    bit. A token with NaN gets NaN scores and gates, and experts that exist. Raises ValueError where the arguments do
    not match.
    """
    check_shape("h", h, None, None)
    check_shape("weight", weight, None, h.shape[1])
    check_same_device("weight", weight, "h", h)
    _check_groups(len(weight), experts_per_token, num_groups, groups_per_token)
    if not use_kernel(h):
        check_dtype("h", h, *REFERENCE_FLOATS)
        check_dtype("weight", weight, *REFERENCE_FLOATS)
        from dsv2.kernels.route.reference import route as run
    else:
        check_dtype("h", h, *FLOATS)
        check_dtype("weight", weight, *FLOATS)
        from dsv2.kernels.route.kernel import route as run
    return run(
        h,
        weight,
        experts_per_token=experts_per_token,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalize=normalize,
        scaling=scaling,
    )


def _check_groups(num_experts: int, experts_per_token: int, num_groups: int, groups_per_token: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a divisor of the {num_experts} experts")
    if not 1 <= groups_per_token <= num_groups:
        raise ValueError(f"groups_per_token is {groups_per_token}, expected 1 to num_groups={num_groups}")
    eligible = num_experts // num_groups * groups_per_token
    if not 1 <= experts_per_token <= eligible:
        raise ValueError(f"experts_per_token is {experts_per_token}, expected 1 to {eligible}, the eligible experts")
