"""Inputs for sampling: every parameter in one batch, odd widths, ties, masked and broken logits, views, no rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker

Row = Mapping[str, float]

PLAIN: Row = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

ROWS: tuple[Row, ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"temperature": 3.0, "top_k": 90},
    {"top_p": 0.95},
    {"temperature": 5.0, "top_p": 0.2},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 4.0, "top_k": 5, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 1e-6, "top_k": 5, "top_p": 0.9},
    {"temperature": 1e6, "top_k": 5, "top_p": 0.7},
    {"temperature": 1e6, "top_p": 0.01},
    {"temperature": 1e6, "top_k": 10**9, "top_p": 0.5},
)
"""Parameters that differ from PLAIN."""


def parameters(maker: Maker, rows: tuple[Row, ...]) -> dict[str, Tensor]:
    full = [{**PLAIN, **row} for row in rows]
    dtypes = {"top_k": torch.int32}
    limits = {n: maker.tensor([row[n] for row in full], dtypes.get(n, torch.float32)) for n in PLAIN}
    return limits | {
        "seed": maker.integers(-(2**63), 2**63 - 1, len(rows)),
        "step": maker.integers(0, 2**40, len(rows)),
    }


def penalties(maker: Maker, B: int, W: int) -> dict[str, Tensor]:
    """Every third row without."""
    used = (torch.arange(B) % 3 > 0).float()
    return {
        "output_counts": (maker.integers(0, 9, B, W) - 5).clamp(min=0).to(torch.int32),
        "prompt_mask": maker.integers(0, 4, B, W) == 0,
        "presence_penalty": (used * 0.5).to(maker.device),
        "frequency_penalty": (used * -0.25).to(maker.device),
        "repetition_penalty": (used * 0.25 + 1).to(maker.device),
    }


def _mixed(W: int, penalised: bool, rows: tuple[Row, ...] = ROWS) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        inputs = {"logits": maker.normal(len(rows), W, std=3.0)} | parameters(maker, rows)
        return inputs | penalties(maker, len(rows), W) if penalised else inputs

    return make


def _ties(maker: Maker) -> dict[str, Any]:
    """Five distinct logits over 300 tokens."""
    logits = maker.integers(0, 5, len(ROWS), 300).to(maker.dtype)
    return {"logits": logits} | parameters(maker, ROWS)


def _masked(maker: Maker) -> dict[str, Any]:
    """Three tokens left, fewer than most top_k; then one, then none; and NaN among the others."""
    rows = (*ROWS, {}, {"top_k": 2, "top_p": 0.9}, {"temperature": 0.0}, {"top_p": 0.5})
    logits = maker.normal(len(rows), 130, std=3.0)
    logits[:, 3:] = -math.inf
    logits[:, 100] = math.nan
    logits[-4:-2, 1:] = -math.inf
    logits[-2:] = -math.inf
    return {"logits": logits} | parameters(maker, rows)


def _views(maker: Maker) -> dict[str, Any]:
    """Rows inside wider rows, full of NaN beside them; tables by columns."""
    B, W = len(ROWS), 100
    wide = maker.normal(B, W + 30, std=3.0)
    wide[:, W:] = math.nan
    tables = penalties(maker, B, W)
    for name in ("output_counts", "prompt_mask"):
        tables[name] = tables[name].t().contiguous().t()
    return {"logits": wide[:, :W]} | parameters(maker, ROWS) | tables


def _only(*names: str) -> Inputs:
    """Of the penalties' arguments these alone."""

    def make(maker: Maker) -> dict[str, Any]:
        B, W = 12, 97
        inputs = _mixed(W, False, ROWS[:B])(maker)
        return inputs | {n: x for n, x in penalties(maker, B, W).items() if n in names}

    return make


CASES = (
    *(Case(name=f"mixed-W{W}", inputs=_mixed(W, False)) for W in (3, 97, 1024)),
    Case(name="mixed-W5000", inputs=_mixed(5000, False, ROWS[8:14])),
    *(Case(name=f"penalised-W{W}", inputs=_mixed(W, True)) for W in (97, 1000)),
    Case(name="repetition-of-the-prompt", inputs=_only("prompt_mask", "repetition_penalty")),
    Case(name="repetition-of-the-output", inputs=_only("output_counts", "repetition_penalty")),
    Case(name="presence", inputs=_only("output_counts", "presence_penalty")),
    Case(name="frequency", inputs=_only("output_counts", "prompt_mask", "frequency_penalty")),
    Case(name="tables-without-penalties", inputs=_only("output_counts", "prompt_mask")),
    Case(name="ties", inputs=_ties),
    Case(name="masked", inputs=_masked),
    Case(name="views", inputs=_views),
    Case(name="one-token", inputs=_mixed(1, True)),
    Case(name="empty", inputs=_mixed(97, True, ())),
)


def _by_sorting(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """The usual way: sort, cut, and race exponential numbers (of one generator: rows do not have their own)."""
    log_probs_BW = logits.float().log_softmax(-1)
    sorted_BW, order_BW = (logits.float() / temperature.clamp(min=1e-5)[:, None]).softmax(-1).sort(descending=True)
    rank_W = torch.arange(logits.shape[1], device=logits.device)
    k_B1 = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    sorted_BW = sorted_BW * (rank_W < k_B1) * (sorted_BW >= min_p[:, None] * sorted_BW[:, :1])
    before_BW = sorted_BW.cumsum(-1) - sorted_BW
    sorted_BW = sorted_BW * (before_BW < top_p[:, None] * sorted_BW.sum(-1, keepdim=True))
    drawn_B1 = (sorted_BW / torch.empty_like(sorted_BW).exponential_()).argmax(-1, keepdim=True)
    drawn_B1 = torch.where(temperature[:, None] > 0, drawn_B1, 0)
    ids_B1 = order_BW.gather(-1, drawn_B1)
    return ids_B1.squeeze(-1), log_probs_BW.gather(-1, ids_B1).squeeze(-1)


def _benchmark(name: str, B: int, target_us: float, std: float = 3.0, **row: float) -> Benchmark:
    """Logits of a V2 head in bf16, read once; the work in between is not counted."""
    W = 102400

    def make(device: torch.device) -> dict[str, Any]:
        limits = parameters(Maker.seeded(0, device), ({"temperature": 1.0} | row,) * B)
        return {"logits": torch.randn(B, W, device=device, dtype=torch.bfloat16) * std} | limits

    return Benchmark(
        name=f"{name}-B{B}",
        inputs=make,
        flops=0.0,
        bytes=2.0 * B * W,
        baselines={"torch, by sorting": _by_sorting},
        target_us=target_us,
    )


BENCHMARKS = (
    _benchmark("greedy", 1, 15, temperature=0.0),
    _benchmark("plain", 1, 15),
    _benchmark("top_p", 1, 40, temperature=0.3, top_p=0.95),
    _benchmark("top_k-top_p", 1, 40, temperature=0.7, top_k=50, top_p=0.95),
    _benchmark("greedy", 256, 50, temperature=0.0),
    _benchmark("plain", 256, 150),
    _benchmark("top_p", 256, 250, temperature=0.3, top_p=0.95),
    _benchmark("top_k-top_p", 256, 250, temperature=0.7, top_k=50, top_p=0.95),
    _benchmark("flat-top_p", 256, 250, std=1.0, top_p=0.9),
)
