"""Inputs for route: official numbers of experts and groups, odd ones, ties, rows of NaN, one token, none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker


def _inputs(T: int, D: int, E: int, A: int, **options: Any) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        h, weight = maker.normal(T, D), maker.normal(E, D, std=D**-0.5)
        return {"h": h, "weight": weight, "experts_per_token": A, **options}

    return make


def _ties(T: int, D: int, E: int, A: int, **options: Any) -> Inputs:
    """Small integers, whose products add up exactly in any order: many experts, and groups, score the same."""

    def make(maker: Maker) -> dict[str, Any]:
        h, weight = (maker.integers(-1, 2, n, D).to(maker.dtype) for n in (T, E))
        return {"h": h, "weight": weight, "experts_per_token": A, **options}

    return make


def _views(D: int) -> Inputs:
    """Rows inside wider ones, with NaN beside them."""

    def make(maker: Maker) -> dict[str, Any]:
        h, weight = maker.normal(5, D + 16), maker.normal(7, D + 16, std=D**-0.5)
        for x in (h, weight):
            x[:, :8], x[:, D + 8 :] = float("nan"), float("nan")
        return {"h": h[:, 8 : D + 8], "weight": weight[:, 8 : D + 8], "experts_per_token": 2}

    return make


def _nan_rows(maker: Maker) -> dict[str, Any]:
    """Tokens 1 and 3 hold a NaN; they must choose experts that exist and leave the others alone."""
    h = maker.normal(5, 32)
    h[1, 7], h[3] = float("nan"), float("nan")
    groups = {"num_groups": 4, "groups_per_token": 2}
    return {"h": h, "weight": maker.normal(12, 32), "experts_per_token": 3, **groups}


def _mixed(maker: Maker) -> dict[str, Any]:
    """An fp32 router over hidden states of any dtype."""
    weight = maker.normal(8, 24, dtype=torch.float32)
    return {"h": maker.normal(3, 24), "weight": weight, "experts_per_token": 2, "scaling": 2.5}


_V2 = {"num_groups": 8, "groups_per_token": 3, "scaling": 16.0}
BOTH = ("h", "weight")

CASES = (
    Case(name="v2", inputs=_inputs(3, 64, 160, 6, **_V2), gradients=BOTH),
    Case(name="v2-normalized", inputs=_inputs(3, 40, 160, 6, **_V2, normalize=True), gradients=BOTH),
    Case(name="v2-parts", inputs=_inputs(37, 530, 160, 6, **_V2), gradients=BOTH),
    Case(name="v2-ties", inputs=_ties(4, 3, 160, 6, **_V2), gradients=BOTH),
    *(
        Case(name=f"T{T}-D{D}-E{E}-A{A}", inputs=_inputs(T, D, E, A), gradients=BOTH)
        for T, D, E, A in ((1, 256, 64, 6), (63, 40, 8, 2), (64, 8, 16, 1), (65, 100, 5, 5), (33, 136, 256, 8))
    ),
    *(
        Case(name=f"parts-T{T}-D{D}-E{E}-A{A}", inputs=_inputs(T, D, E, A), gradients=BOTH)
        for T, D, E, A in ((1, 257, 64, 6), (5, 300, 129, 1), (33, 513, 20, 4), (2, 2049, 8, 3))
    ),
    Case(name="normalized", inputs=_inputs(33, 24, 5, 3, normalize=True, scaling=3.0), gradients=BOTH),
    Case(name="normalized-one", inputs=_inputs(3, 24, 5, 1, normalize=True, scaling=3.0), gradients=BOTH),
    Case(name="ties", inputs=_ties(33, 4, 12, 4), gradients=BOTH),
    Case(name="ties-groups", inputs=_ties(33, 4, 12, 4, num_groups=4, groups_per_token=2), gradients=BOTH),
    Case(name="all-groups", inputs=_inputs(3, 16, 6, 6, num_groups=3, groups_per_token=3), gradients=BOTH),
    *(Case(name=f"views-D{D}", inputs=_views(D), gradients=BOTH) for D in (32, 264)),
    Case(name="mixed-dtypes", inputs=_mixed, gradients=BOTH),
    # numpy, which interprets, warns of any NaN in a product; `test_route` has a like case for it.
    Case(name="nan-rows", inputs=_nan_rows, dtypes=()),
    Case(name="empty", inputs=_inputs(0, 16, 8, 2), gradients=BOTH),
)


def plain(h: Tensor, weight: Tensor, *, experts_per_token: int, scaling: float = 1.0, **_: Any) -> tuple[Tensor, ...]:
    """Without groups, ties and counts."""
    scores_TE = F.linear(h.float(), weight.float()).softmax(-1)
    gates_TA, experts_TA = scores_TE.topk(experts_per_token)
    return scores_TE, experts_TA, gates_TA * scaling


def _benchmark(T: int, D: int, E: int, *, backward: bool = False, **options: Any) -> Benchmark:
    A = 6

    def make(device: torch.device) -> dict[str, Any]:
        # Logits are exact multiples of 1/8, so that no choice hangs on a rounding: parity compares the choices.
        h, weight = (torch.randint(-1, 2, (n, D), device=device).bfloat16() for n in (T, E))
        return {"h": h, "weight": weight / 8, "experts_per_token": A, **options}

    tokens, centroids, scores, gates = 2.0 * T * D, 2.0 * E * D, 4.0 * T * E, 4.0 * T * A
    forward = tokens + centroids + scores + 3 * gates
    return Benchmark(
        name=f"T{T}-D{D}-E{E}{'-backward' if backward else ''}",
        inputs=make,
        flops=2.0 * T * D * E * (3 if backward else 1),
        # Backward reads h, weight, scores, gates, choices and both cotangents, and writes two gradients.
        bytes=forward + (2 * tokens + 2 * centroids + 2 * scores + 4 * gates if backward else 0),
        gradients=BOTH,
        backward=backward,
        baselines={"torch": plain},
        target_us=None if backward or T > 512 else 6.0 if E <= 64 else 10.0,
    )


BENCHMARKS = (
    *(_benchmark(T, 2048, 64) for T in (1, 64, 512, 2048, 16384)),
    _benchmark(16384, 2048, 64, backward=True),
    *(_benchmark(T, 5120, 160, **_V2) for T in (1, 128, 4096)),
)
