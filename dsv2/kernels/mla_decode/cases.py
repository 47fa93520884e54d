"""Inputs for mla_decode: ragged lengths around a page, random pages, NaN in every slot that no length covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker
from dsv2.kernels.mla_decode import PAGE, num_parts, plan_decode

HUGE = 2_147_480_000
"""An entry that must not be read."""

RAGGED = (0, 1, 63, 64, 65, 200, 129)


def _inputs(lengths: Sequence[int], H: int, n: int, C: int, R: int, parts: int) -> Inputs:
    def make(maker: Maker) -> dict[str, Any]:
        B, T = len(lengths), len(lengths) * n
        pages = [-(-length // PAGE) for length in lengths]
        ids = torch.randperm(sum(pages) + 3, generator=maker.generator).tolist()
        table = torch.full((B, max(pages, default=0) + 2), HUGE, dtype=torch.int32)
        cache = maker.normal(sum(pages) + 3, PAGE, C + R)
        covered = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b, length in enumerate(lengths):
            for i in range(pages[b]):
                table[b, i] = page = ids.pop()
                covered[page, : length - i * PAGE] = True
        cache[~covered.to(cache.device)] = float("nan")
        # As the model hands them over: heads before tokens, and the last channels of a wider projection.
        q_latent = maker.normal(H, T, C).transpose(0, 1)
        q_rope = maker.normal(T, H, 2 * R)[..., R:]
        lengths_B = maker.tensor(list(lengths), torch.int32)
        return {
            "q_latent": q_latent,
            "q_rope": q_rope,
            "cache": cache,
            "page_table": table.to(maker.device),
            "lengths": lengths_B,
            "scale": (C + R) ** -0.5,
            "plan": plan_decode(lengths_B, parts),
        }

    return make


def _lengths(lengths: Sequence[int], parts: int) -> Inputs:
    return lambda maker: {"lengths": maker.tensor(list(lengths), torch.int32), "num_parts": parts}


CASES = (
    *(
        Case(name=f"{name}-H{H}-n{n}-parts{parts}", inputs=_inputs(lengths, H, n, C, R, parts))
        for name, lengths, H, n, C, R, parts in (
            ("ragged", RAGGED, 5, 1, 32, 16, 4),
            ("ragged", RAGGED, 16, 3, 48, 8, 9),
            ("one-page-a-part", (640,), 4, 1, 32, 16, 64),
            ("shorter-than-the-step", (2, 5, 0), 3, 4, 16, 16, 2),
            ("many-rows", (70, 3), 20, 8, 16, 16, 3),
            ("all-empty", (0, 0), 4, 1, 16, 16, 3),
            ("no-sequence", (), 4, 0, 16, 16, 3),
        )
    ),
    *(
        Case(
            name=f"official-{name}-H{H}-n{n}", inputs=_inputs(lengths, H, n, 512, 64, parts), dtypes=()
        )
        for name, lengths, H, n, parts in (
            ("ragged", RAGGED, 16, 1, 5),
            ("ragged", RAGGED, 128, 1, 3),
            ("ragged", RAGGED, 16, 2, 132),
            ("ragged", RAGGED, 5, 5, 4),
            ("ragged", RAGGED, 16, 4, 7),
            ("ragged", RAGGED, 100, 8, 7),
            ("long", (8192, 1, 3000), 16, 1, 132),
            ("long", (8192, 0, 3000), 128, 1, 66),
            ("empty", (0, 0, 0), 16, 1, 132),
        )
    ),
    *(
        Case(
            name=f"plan-{name}-{parts}",
            function="plan_decode",
            inputs=_lengths(lengths, parts),
            dtypes=(torch.float32,),
            gpu_dtypes=(torch.float32,),
        )
        for name, lengths, parts in (
            ("ragged", RAGGED, 1),
            ("ragged", RAGGED, 6),
            ("equal", (4096,) * 20, 17),
            ("one", (131072,), 132),
            ("empty", (0,) * 9, 4),
            ("none", (), 2),
        )
    ),
)  # fmt: skip


def _benchmark(H: int, B: int, S: int, n: int, target_us: float | None) -> Benchmark:
    def make(device: torch.device) -> dict[str, Any]:
        bf16: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        pages = S // PAGE
        table = torch.randperm(B * pages, device=device).view(B, pages).to(torch.int32)
        lengths = torch.full((B,), S, device=device, dtype=torch.int32)
        return {
            "q_latent": torch.randn(B * n, H, 512, **bf16),
            "q_rope": torch.randn(B * n, H, 64, **bf16),
            "cache": torch.randn(B * pages, PAGE, 576, **bf16),
            "page_table": table,
            "lengths": lengths,
            "scale": 192**-0.5,
            "plan": plan_decode(lengths, num_parts(H * n, device)),
        }

    return Benchmark(
        name=f"H{H}-{B}x{S}" + (f"-n{n}" if n > 1 else ""),
        inputs=make,
        flops=2.0 * B * n * H * S * (576 + 512),
        bytes=2.0 * B * (S * 576 + n * H * (576 + 512)),
        target_us=target_us,
    )


BENCHMARKS = tuple(
    _benchmark(*shape)
    for shape in (
        (16, 1, 8192, 1, 15.0),
        (16, 1, 131072, 1, 65.0),
        (16, 32, 4096, 1, 62.0),
        (16, 128, 4096, 1, 210.0),
        (16, 128, 8192, 1, 412.0),
        (128, 1, 8192, 1, 30.0),
        (128, 1, 131072, 1, 113.0),
        (128, 32, 4096, 1, 94.0),
        (128, 128, 4096, 1, 290.0),
        (128, 128, 8192, 1, 572.0),
        (16, 32, 4096, 4, None),
    )
)
