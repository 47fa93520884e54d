"""Writing what MLA caches of a token (DeepSeek-V2 equations 9 and 15): its latent, normalised, and its rotary key."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import (
    FLOATS,
    REFERENCE_FLOATS,
    check_dtype,
    check_positive,
    check_same_device,
    check_shape,
    use_kernel,
)
from dsv2.kernels.rope import check_tables

PAGE_SIZE = 64


@torch.no_grad()
def write_latent(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    cache: Tensor,
    slots: Tensor,
    q_rope: Tensor | None = None,
) -> None:
    """Row slots[t] of cache.view(-1, C + R) becomes rms_norm(kv[t, :C], weight, eps) and rope(kv[t, C:]).

    Args:
        kv: [T, C + R], what kv_a_proj_with_mqa gives, float32, float16 or bfloat16 (float64 in the reference); rows
            may be strided.
        weight: [C] in kv's dtype, the gain of the latent's norm.
        cos, sin: [T, R/2] float32; `layout` as in rope.
        cache: [P, 64, C + R] in kv's dtype, contiguous. Written in place; rows that no slot names stay as they are.
        slots: [T] int64, page * 64 + offset, each at most once; rows with a negative one (padding) are not written.
        q_rope: [T, H, R] in kv's dtype, to be rotated where it is, padding too; channels side by side.

    Not differentiable. Raises ValueError where the arguments do not match. NOTE: a slot beyond the cache is an
    IndexError in the reference, but the kernel cannot raise, and leaves its row unwritten.
    """
    _check(kv, weight, cache, slots)
    check_tables(cos, sin, layout, "kv", kv, num_channels=kv.shape[1] - weight.shape[0])
    if q_rope is not None:
        check_shape("q_rope", q_rope, len(kv), None, kv.shape[1] - weight.shape[0])
        check_dtype("q_rope", q_rope, kv.dtype)
        check_same_device("q_rope", q_rope, "kv", kv)
        if q_rope.stride(-1) != 1:
            raise ValueError(f"q_rope has strides {q_rope.stride()}, expected channels side by side")
    if not use_kernel(kv):
        check_dtype("kv", kv, *REFERENCE_FLOATS)
        from dsv2.kernels.latent_cache.reference import write_latent as run
    else:
        check_dtype("kv", kv, *FLOATS)
        check_dtype("cos", cos, torch.float32)
        check_dtype("sin", sin, torch.float32)
        from dsv2.kernels.latent_cache.kernel import write_latent as run
    run(kv, weight, eps, cos, sin, layout, cache, slots, q_rope)


def _check(kv: Tensor, weight: Tensor, cache: Tensor, slots: Tensor) -> None:
    check_shape("kv", kv, None, None)
    check_shape("weight", weight, None)
    check_positive("the width of weight", len(weight))
    check_shape("cache", cache, None, PAGE_SIZE, kv.shape[1])
    check_positive("the number of the cache's pages", len(cache))
    check_shape("slots", slots, kv.shape[0])
    check_dtype("slots", slots, torch.int64)
    for name, other in (("weight", weight), ("cache", cache)):
        check_dtype(name, other, kv.dtype)
    for name, other in (("weight", weight), ("cache", cache), ("slots", slots)):
        check_same_device(name, other, "kv", kv)
    if not cache.is_contiguous():
        raise ValueError(f"cache has strides {cache.stride()}, expected those of a contiguous tensor")
