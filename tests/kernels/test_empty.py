"""What has no width is refused before either implementation sees it: some kernels and references would not agree."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def moe(T: int = 3, A: int = 2, E: int = 4, D: int = 16, F: int = 8) -> dict[str, Any]:
    choice = {"experts": integers(T, A), "gates": floats(T, A)}
    return {"x": floats(T, D), "gate_up": floats(E, 2 * F, D), "down": floats(E, D, F)} | choice


def dense(D: int, F: int) -> dict[str, Any]:
    return {"x": floats(3, D), "gate": floats(F, D), "up": floats(F, D), "down": floats(D, F)}


def latent(C: int = 8, num_pages: int = 2) -> dict[str, Any]:
    tables = {"cos": floats(2, 2), "sin": floats(2, 2), "layout": "half", "eps": 1e-6}
    cache = {"cache": floats(num_pages, 64, C + 4), "slots": integers(2) - 1}
    return {"kv": floats(2, C + 4), "weight": floats(C)} | tables | cache


def places(num_rows: int) -> Tensor:
    return integers(num_rows, dtype=torch.int32)


ATTENTION = {"q": floats(3, 0, 16), "k": floats(3, 1, 16), "v": floats(3, 1, 16), "cu_seqlens": places(2), "scale": 1.0}
REFUSED = (
    ("rms_norm.rms_norm", {"x": floats(3, 0), "weight": floats(0), "eps": 1e-6}, "the width of x is 0"),
    (
        "add_rms_norm.add_rms_norm",
        {"x": floats(3, 0), "residual": floats(3, 0), "weight": floats(0), "eps": 1e-6},
        "the width of x is 0",
    ),
    ("grouped_mlp.grouped_mlp", moe(A=0), "the width of experts is 0"),
    ("grouped_mlp.grouped_mlp", moe(E=0), "the number of matrices in down is 0"),
    ("grouped_mlp.grouped_mlp", moe(D=0), "x has D=0 channels"),
    ("grouped_mlp.grouped_mlp", moe(F=0), "down F=0"),
    ("grouped_mlp.swiglu_mlp", dense(D=0, F=8), "x has D=0 channels"),
    ("grouped_mlp.swiglu_mlp", dense(D=16, F=0), "down F=0"),
    ("permute.sort_rows", {"experts": integers(3, 0), "num_experts": 4}, "the width of experts is 0"),
    ("permute.sort_rows", {"experts": integers(0, 2), "num_experts": 0}, "num_experts is 0"),
    (
        "permute.gather_rows",
        {"x": floats(3, 8), "order": places(0), "inverse": places(0), "experts_per_token": 0},
        "experts_per_token is 0",
    ),
    (
        "permute.gather_rows",
        {"x": floats(3, 0), "order": places(6), "inverse": places(6), "experts_per_token": 2},
        "the width of x is 0",
    ),
    (
        "permute.combine_rows",
        {"rows": floats(0, 8), "inverse": places(0), "gates": floats(3, 0)},
        "the width of gates is 0",
    ),
    (
        "permute.combine_rows",
        {"rows": floats(6, 0), "inverse": places(6), "gates": floats(3, 2)},
        "the width of rows is 0",
    ),
    ("latent_cache.write_latent", latent(C=0), "the width of weight is 0"),
    ("latent_cache.write_latent", latent(num_pages=0), "the number of the cache's pages is 0"),
    ("mla_prefill.mla_prefill", ATTENTION, "the number of q's heads is 0"),
)


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_has_no_width_is_refused(function: str, arguments: dict[str, Any], message: str) -> None:
    room, name = function.split(".")
    with pytest.raises(ValueError, match=message):
        getattr(importlib.import_module(f"dsv2.kernels.{room}"), name)(**arguments)
