"""Causal attention inside packed documents (DeepSeek-V2 equation 18, or 7 for MHA and its kin): training, prefill.

Keys and values are expanded: a set a head, or one that several heads share (GQA, MQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv2.kernels.backend import (
    HOPPER,
    REFERENCE_FLOATS,
    capability,
    check_dtype,
    check_positive,
    check_same_device,
    check_shape,
    use_kernel,
)

HALF = (torch.bfloat16, torch.float16)
MAX_WIDTH = 256


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    *,
    bounds: Sequence[int] | None = None,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    cu_seqlens_prefix: Tensor | None = None,
    k_rope: Tensor | None = None,
    k_rope_prefix: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q . k) v over the keys that a row sees: those of its document up to itself, and a prefix's.

    Args:
        q: [T, H, K]. Rows and heads of q, k and v may be strided; K and V go up to 256.
        k, v: [T, H', K] and [T, H', V]; H' divides H, and head h reads k and v of head h // (H / H').
        cu_seqlens: [N + 1] int32 on q's device: document i is the rows cu_seqlens[i]:cu_seqlens[i + 1]. Documents
            tile the rows, from 0 to T; some may be empty.
        scale: of the logits, 1/sqrt(K) times YaRN's softmax factor.
        bounds: the numbers of cu_seqlens on the host, where the caller knows them. They only choose what runs: `plan`.
        k_prefix, v_prefix: [S, H', K] and [S, H', V], cached keys and values before each document's own, of which all
            rows of the document see all. cu_seqlens_prefix [N + 1] int32 bounds them. All three or none.
        k_rope, k_rope_prefix: [T, R] and [S, R], channels that all heads share, as MLA's rotated keys are: keys are
            [k, k_rope] then, and k and k_prefix have K - R channels. Without gradients the kernel reads them as they
            are, in the widths that MLA has; otherwise keys are laid out first.

    Returns [T, H, V] in q's dtype. Softmax in fp32. Differentiable in q, k, v, k_prefix and v_prefix. On a GPU nothing
    waits for it and no launch depends on lengths (except under plan `reference`). NaN or infinity in a
    document reaches no output and no gradient of another. Raises ValueError where arguments do not match.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected above 0")
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_prefix = None if cu_seqlens_prefix is None else cu_seqlens_prefix.contiguous()
    prefix, rope = (k_prefix, v_prefix, cu_seqlens_prefix), (k_rope, k_rope_prefix)
    _check(q, k, v, cu_seqlens, bounds, *prefix, *rope)
    chosen = plan(q, k, v, bounds, has_prefix=k_prefix is not None)
    if chosen == "triton":
        from dsv2.kernels.mla_prefill.kernel import mla_prefill as kernel

        return kernel(q, k, v, cu_seqlens, scale, *prefix, *rope)
    if chosen == "reference" or bounds is None:
        from dsv2.kernels.mla_prefill.reference import mla_prefill as reference

        return reference(q, k, v, cu_seqlens, scale, *prefix, *rope, bounds=bounds)
    from dsv2.kernels.mla_prefill.reference import with_rope
    from dsv2.kernels.mla_prefill.sdpa import mla_prefill as sdpa

    k = k if k_rope is None else with_rope(k, k_rope)
    if chosen == "sdpa":
        return sdpa(q, k, v, bounds, scale)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, bounds, scale)


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int] | None,
    *,
    has_prefix: bool = False,
) -> str:
    """Which implementation `mla_prefill` runs: the fastest that can.

    `cudnn-batched`: training on documents of one length, on Hopper. cuDNN's backward is faster there than the
    kernel's, but it takes 0.1 s to plan each shape that it has not met, so it gets lengths that recur, multiples of
    128. Its gradient of q does not repeat bit for bit: torch.use_deterministic_algorithms keeps it away.
    `triton`: everything else on a GPU in bf16 or fp16; repeats bit for bit.
    `sdpa`: what the kernel cannot take, by PyTorch's choice. `reference`: the same with a prefix or without `bounds`.
    """
    if q.dtype not in HALF or not use_kernel(q):
        return "reference" if bounds is None or len(bounds) < 2 or has_prefix else "sdpa"
    if bounds is None or has_prefix or not _trains(q, k, v) or torch.are_deterministic_algorithms_enabled():
        return "triton"
    return "cudnn-batched" if _suits_cudnn(q, v, bounds) else "triton"


def _suits_cudnn(q: Tensor, v: Tensor, bounds: Sequence[int]) -> bool:
    """One length, of a kind that recurs, and widths that are known to work."""
    lengths = {b - a for a, b in pairwise(bounds)}
    K, V = q.shape[2], v.shape[2]
    return (
        len(lengths) == 1
        and (length := lengths.pop()) > 0
        and length % 128 == 0
        and K % 8 == V % 8 == 0
        and K <= 192
        and V <= 128
        and capability(q.device) == HOPPER
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    bounds: Sequence[int] | None,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    cu_seqlens_prefix: Tensor | None,
    k_rope: Tensor | None,
    k_rope_prefix: Tensor | None,
) -> None:
    check_shape("q", q, None, None, None)
    check_dtype("q", q, *REFERENCE_FLOATS)
    T, H, K = q.shape
    check_positive("the number of q's heads", H)
    rope = {} if k_rope is None else {"k_rope": k_rope}
    if k_rope is not None:
        check_shape("k_rope", k_rope, T, None)
        if k_prefix is not None:
            if k_rope_prefix is None:
                raise ValueError("k_rope_prefix is None, expected the rest of the keys")
            check_shape("k_rope_prefix", k_rope_prefix, len(k_prefix), k_rope.shape[1])
            rope |= {"k_rope_prefix": k_rope_prefix}
    key_width = K if k_rope is None else K - k_rope.shape[1]
    check_shape("k", k, T, None, key_width)
    heads = k.shape[1]
    check_shape("v", v, T, heads, None)
    V = v.shape[2]
    if heads == 0 or H % heads:
        raise ValueError(f"k has {heads} heads, expected a divisor of q's {H}")
    if not (0 < K <= MAX_WIDTH and 0 < V <= MAX_WIDTH):
        raise ValueError(f"q has {K} channels a head and v {V}, expected 1 to {MAX_WIDTH}")
    check_shape("cu_seqlens", cu_seqlens, None)
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens is empty, expected 0 at least")
    N = len(cu_seqlens) - 1
    same = {"k": k, "v": v} | rope
    indices = {"cu_seqlens": cu_seqlens}
    if bounds is not None and (len(bounds) != N + 1 or bounds[0] != 0 or bounds[-1] != T):
        raise ValueError(f"bounds are {len(bounds)} numbers, {list(bounds[:3])} ..., expected {N + 1} from 0 to {T}")
    if k_prefix is not None or v_prefix is not None or cu_seqlens_prefix is not None:
        if k_prefix is None or v_prefix is None or cu_seqlens_prefix is None:
            raise ValueError("k_prefix, v_prefix and cu_seqlens_prefix: some are None, expected all three or none")
        check_shape("k_prefix", k_prefix, None, heads, key_width)
        check_shape("v_prefix", v_prefix, len(k_prefix), heads, V)
        check_shape("cu_seqlens_prefix", cu_seqlens_prefix, N + 1)
        same |= {"k_prefix": k_prefix, "v_prefix": v_prefix}
        indices |= {"cu_seqlens_prefix": cu_seqlens_prefix}
    for name, x in same.items():
        check_dtype(name, x, q.dtype)
    for name, x in indices.items():
        check_dtype(name, x, torch.int32)
    for name, x in (same | indices).items():
        check_same_device(name, x, "q", q)
