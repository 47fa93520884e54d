"""Norm, rotation and scattered write in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.rms_norm.reference import rms_norm
from dsv2.kernels.rope.reference import rope, rope_


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
    if q_rope is not None:
        rope_(q_rope, cos, sin, layout)
    C = weight.shape[0]
    c_kv_TC = rms_norm(kv[:, :C], weight, eps)
    k_rope_TR = rope(kv[:, None, C:], cos, sin, layout)[:, 0]
    _write(cache.view(-1, cache.shape[-1]), torch.cat((c_kv_TC, k_rope_TR), -1), slots)


def _write(cache_Sx: Tensor, rows_Tx: Tensor, slots_T: Tensor) -> None:
    """Padding repeats the first row that has a slot: choosing rows by a mask would make the host wait for their number.

    Where no row has a slot, row 0 of the cache is written with itself.
    """
    if len(slots_T) == 0:
        return
    real_T = slots_T >= 0
    source_T = torch.where(real_T, torch.arange(len(slots_T), device=slots_T.device), real_T.int().argmax())
    slots_T = slots_T[source_T].clamp(min=0)
    cache_Sx[slots_T] = torch.where(real_T.any(), rows_Tx[source_T], cache_Sx[slots_T])
