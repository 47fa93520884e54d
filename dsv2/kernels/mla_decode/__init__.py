"""Absorbed latent attention over a paged cache (DeepSeek-V2 section 2.1.2): what a decode step does.

All heads attend to one shared key [c_kv, k_rope] of C + R channels; c_kv is also the value. A step is 1 to 8 query
tokens of every sequence, the last ones of its length (several when speculation is verified).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2.kernels.backend import (
    FLOATS,
    REFERENCE_FLOATS,
    check_dtype,
    check_same_device,
    check_shape,
    num_multiprocessors,
    use_kernel,
)
from dsv2.kernels.latent_cache import PAGE_SIZE as PAGE

MAX_QUERY_TOKENS = 8


OVERHEAD_PAGES = 2
"""What beginning a sequence costs a program, in pages: queries, the first wait, the output."""


class DecodePlan(NamedTuple):
    """How a step's pages are dealt to programs; computed on the device, once a step, for all layers.

    Sequences lie end to end and are cut into parts of about equal work. `parts` [P, 8] int32: first sequence, its first
    page, last sequence, its end page, slot of the first piece. A sequence that is cut owns the slots splits[b] to
    splits[b + 1] of the partial results; one that is not owns none. `cut` [P] int32 lists the cut sequences, then -1.
    """

    parts: Tensor
    splits: Tensor
    cut: Tensor


def num_parts(num_rows: int, device: torch.device) -> int:
    """Parts that fill the GPU once; `num_rows` is heads times query tokens a sequence, in tiles of at most 64."""
    tiles = -(-num_rows // 64)
    return max(num_multiprocessors(device) // max(tiles, 1), 1)


def plan_decode(lengths: Tensor, num_parts: int) -> DecodePlan:
    """Deal the pages of `lengths` [B] int32 (tokens, the step's own included) to so many parts, see `num_parts`."""
    check_dtype("lengths", lengths, torch.int32)
    check_shape("lengths", lengths, None)
    if num_parts < 1:
        raise ValueError(f"num_parts is {num_parts}, expected at least 1")
    if use_kernel(lengths):
        from dsv2.kernels.mla_decode.kernel import plan_decode as run
    else:
        from dsv2.kernels.mla_decode.reference import plan_decode as run
    return DecodePlan(*run(lengths, num_parts))


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    plan: DecodePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * [q_latent, q_rope] . [c_kv, k_rope]) c_kv of every sequence's last tokens over its cache.

    Args:
        q_latent: [T, H, C], queries with W_UK absorbed; T = B * n, n tokens a sequence, 1 <= n <= 8; may be strided.
        q_rope: [T, H, R], rotated queries; may be strided.
        cache: [P, 64, C + R] pages, contiguous, for the kernel from a multiple of 16 bytes on; slots that no length
            covers may hold anything.
        page_table: [B, max_pages] int32; entries past a sequence's length are not read.
        lengths: [B] int32, cached tokens of each sequence, this step's included; 0 gives zeros and -inf.
        scale: of the logits, 1/sqrt(N + R) times YaRN's softmax factor.
        plan: of `lengths`, where several layers share it; None: computed here.

    The kernel takes bfloat16, float16 and float32. Not differentiable. Never
    waits for the device, so CUDA graphs can hold it. Raises ValueError where arguments do not match.

    Returns y [T, H, C] in q_latent's dtype and the natural log-sum-exp of the scaled logits [T, H] float32.
    """
    _check(q_latent, q_rope, cache, page_table, lengths)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected above 0")
    if plan is not None and len(plan.splits) != len(lengths) + 1:
        raise ValueError(f"plan is of {len(plan.splits) - 1} sequences, expected one of the {len(lengths)} of lengths")
    if not use_kernel(q_latent):
        check_dtype("q_latent", q_latent, *REFERENCE_FLOATS)
        from dsv2.kernels.mla_decode.reference import mla_decode as reference

        return reference(q_latent, q_rope, cache, page_table, lengths, scale)
    check_dtype("q_latent", q_latent, *FLOATS)
    from dsv2.kernels.mla_decode.kernel import mla_decode as kernel

    if plan is None:
        T, H, _ = q_latent.shape
        plan = plan_decode(lengths, num_parts(H * (T // max(len(lengths), 1)), q_latent.device))
    return kernel(q_latent, q_rope, cache, page_table, lengths, scale, plan)


def _check(q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    check_shape("q_latent", q_latent, None, None, None)
    T, H, C = q_latent.shape
    check_shape("q_rope", q_rope, T, H, None)
    check_shape("cache", cache, None, PAGE, C + q_rope.shape[-1])
    check_shape("lengths", lengths, None)
    B = len(lengths)
    check_shape("page_table", page_table, B, None)
    if T != 0 and (B == 0 or T % B or not 1 <= T // B <= MAX_QUERY_TOKENS):
        raise ValueError(
            f"q_latent has {T} tokens for {B} sequences, expected 1 to {MAX_QUERY_TOKENS} a sequence, all the same"
        )
    for name, x in (("q_rope", q_rope), ("cache", cache)):
        check_dtype(name, x, q_latent.dtype)
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        check_dtype(name, x, torch.int32)
    for name, x in (("q_rope", q_rope), ("cache", cache), ("page_table", page_table), ("lengths", lengths)):
        check_same_device(name, x, "q_latent", q_latent)
    if not cache.is_contiguous():
        raise ValueError(f"cache has strides {cache.stride()}, expected contiguous pages")
