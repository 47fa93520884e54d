"""Inputs for mla_prefill: ragged documents around the block sizes, some of them NaN, shared heads, views, prefixes."""

from __future__ import annotations

from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv2.kernels.case import Benchmark, Case, Inputs, Maker
from dsv2.kernels.mla_prefill.sdpa import mla_prefill as sdpa


def bounds_of(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


def _inputs(
    lengths: tuple[int, ...], heads: tuple[int, int], widths: tuple[int, int], prefix: tuple[int, ...] = ()
) -> Inputs:
    (H, H_kv), (K, V), T = heads, widths, sum(lengths)

    def make(maker: Maker) -> dict[str, Any]:
        inputs = {
            "q": maker.normal(T, H, K),
            "k": maker.normal(T, H_kv, K),
            "v": maker.normal(T, H_kv, V),
            "cu_seqlens": maker.tensor(bounds_of(lengths), torch.int32),
            "scale": K**-0.5,
        }
        if prefix:
            inputs["k_prefix"] = maker.normal(sum(prefix), H_kv, K)
            inputs["v_prefix"] = maker.normal(sum(prefix), H_kv, V)
            inputs["cu_seqlens_prefix"] = maker.tensor(bounds_of(prefix), torch.int32)
        return inputs

    return make


def _views(maker: Maker) -> dict[str, Any]:
    """Content keys and values as halves of one projection, as MLA has them, amid memory that nobody may read."""
    lengths, H = (5, 40), 2
    T = sum(lengths)
    kv = maker.normal(T, H, 64 + 32)
    q = maker.normal(T + 2, H, 64 + 8)
    q[..., 64:] = float("nan")
    q[0] = q[-1] = float("nan")
    inputs = {"q": q[1:-1, :, :64], "k": kv[..., :64], "v": kv[..., 64:]}
    return inputs | {"cu_seqlens": maker.tensor(bounds_of(lengths), torch.int32), "scale": 0.1}


def _shared(lengths: tuple[int, ...], widths: tuple[int, int, int], prefix: tuple[int, ...] = ()) -> Inputs:
    """Keys of two heads that share their last channels, which lie in wider rows."""
    N, R, V = widths

    def make(maker: Maker) -> dict[str, Any]:
        inputs = _inputs(lengths, (2, 2), (N + R, V), prefix)(maker)
        for k, k_rope in (("k", "k_rope"), ("k_prefix", "k_rope_prefix")):
            if k in inputs:
                rows = maker.normal(len(inputs[k]), R + 8)
                rows[:, R:] = float("nan")
                inputs[k], inputs[k_rope] = inputs[k][..., :N], rows[:, :R]
        return inputs

    return make


def _official(lengths: tuple[int, ...], H: int, dirty: tuple[int, ...] = ()) -> Inputs:
    """MLA's widths as the engine has them: k and v are halves of one projection, rotary keys lie in wider rows.

    Documents `dirty` are NaN, and so is then what they give.
    """

    def make(maker: Maker) -> dict[str, Any]:
        T, bounds = sum(lengths), bounds_of(lengths)
        q, kv, rows = maker.normal(T, H, 192), maker.normal(T, H, 256), maker.normal(T, 576)
        rows[:, :512] = float("nan")
        for i in dirty:
            for x in (q, kv, rows):
                x[bounds[i] : bounds[i + 1]] = float("nan")
        inputs = {"q": q, "k": kv[..., :128], "v": kv[..., 128:], "k_rope": rows[:, 512:], "scale": 192**-0.5}
        return inputs | {"cu_seqlens": maker.tensor(bounds, torch.int32)}

    return make


def _steep(maker: Maker) -> dict[str, Any]:
    """Logits of a hundred and more: one key takes all, the others underflow."""
    inputs = _inputs((70, 3), (1, 1), (16, 16))(maker)
    return inputs | {"q": inputs["q"] * 8, "scale": 4.0}


def _broken(inputs: Inputs, value: float, odd: bool) -> Inputs:
    """Every other document is `value` throughout, with its prefix: nothing of it may reach those between."""

    def make(maker: Maker) -> dict[str, Any]:
        made = inputs(maker)
        for ends in ("cu_seqlens", "cu_seqlens_prefix"):
            bounds = made[ends].tolist() if ends in made else []
            for start, stop in list(pairwise(bounds))[odd::2]:
                for x in (
                    ("q", "k", "v", "k_rope") if ends == "cu_seqlens" else ("k_prefix", "v_prefix", "k_rope_prefix")
                ):
                    if x in made:
                        made[x][start:stop] = value
        return made

    return make


NAN, INF = float("nan"), float("inf")
AROUND_BLOCKS = (1, 15, 16, 17, 63, 64, 65, 127, 129, 1)
ALL = ("q", "k", "v")
BLOCK_EDGES = (1, 63, 0, 64, 65, 127, 128, 129)
WITH_PREFIX = (*ALL, "k_prefix", "v_prefix")

CASES = (
    Case(name="ragged", inputs=_inputs((64, 0, 1, 63, 65, 2), (2, 2), (48, 32)), gradients=ALL),
    Case(name="long", inputs=_inputs((130, 259), (1, 1), (48, 32)), gradients=ALL),
    Case(name="v2", inputs=_inputs((129, 7), (1, 1), (192, 128)), gradients=ALL),
    Case(name="gqa", inputs=_inputs((33, 140), (4, 2), (32, 32)), gradients=ALL),
    Case(name="mqa-odd-widths", inputs=_inputs((17, 30), (3, 1), (20, 12)), gradients=ALL),
    Case(name="views", inputs=_views, gradients=ALL),
    Case(name="steep", inputs=_steep, gradients=ALL),
    *(
        Case(name=f"shared-{name}", inputs=_shared((64, 0, 1, 70), widths, prefix), gradients=gradients)
        for name, widths, prefix, gradients in (
            ("narrow", (16, 8, 16), (), ()),
            ("prefix", (16, 8, 16), (3, 0, 65, 2), ()),
            ("v2", (128, 64, 128), (0, 9, 0, 70), ()),
            ("laid-out", (24, 8, 16), (), ()),
            ("gradients", (16, 8, 16), (3, 0, 65, 2), (*WITH_PREFIX, "k_rope", "k_rope_prefix")),
        )
    ),
    *(
        # Too much for the interpreter, which has no Gluon either.
        Case(name=f"official-{name}", inputs=inputs, dtypes=())
        for name, inputs in (
            ("one-row", _official((1,), 16)),
            ("edges", _official((*BLOCK_EDGES, 2048), 16)),
            ("edges-H128", _official(BLOCK_EDGES, 128)),
            ("long", _official((8000, 300), 4)),
            ("many", _official((3, 130) * 150, 3)),
            ("nan-between", _official((200, 300, 77, 128), 4, dirty=(1,))),
            ("nan-last", _official((200, 300, 77, 130), 4, dirty=(3,))),
        )
    ),
    *(
        Case(
            name=f"broken-{name}",
            inputs=_broken(inputs, value, odd),
            gradients=gradients,
            dtypes=(torch.float32,),
        )
        for name, inputs, value, odd, gradients in (
            ("even", _inputs(AROUND_BLOCKS, (1, 1), (48, 32)), NAN, False, ALL),
            ("odd", _inputs(AROUND_BLOCKS, (1, 1), (48, 32)), INF, True, ALL),
            ("v2", _inputs((33, 3, 129, 5), (1, 1), (192, 128)), NAN, True, ALL),
            ("prefix", _inputs((3, 66, 17, 1), (2, 1), (48, 32), (65, 5, 17, 70)), INF, True, WITH_PREFIX),
            ("shared", _shared((3, 66, 17), (16, 8, 16), (65, 5, 17)), NAN, True, ()),
            ("shared-gradients", _shared((3, 17, 20), (16, 8, 16)), NAN, True, (*ALL, "k_rope")),
        )
    ),
    Case(name="no-rows", inputs=_inputs((0, 0), (2, 2), (48, 32)), gradients=ALL),
    Case(name="no-documents", inputs=_inputs((), (2, 2), (48, 32)), gradients=ALL),
    Case(
        name="prefix",
        inputs=_inputs((3, 66, 0, 1), (2, 2), (48, 32), prefix=(129, 1, 5, 0)),
        gradients=WITH_PREFIX,
    ),
    Case(name="prefix-gqa", inputs=_inputs((4, 70), (4, 2), (32, 32), prefix=(0, 200)), gradients=WITH_PREFIX),
    Case(name="empty-prefix", inputs=_inputs((4, 9), (2, 2), (32, 32), prefix=(0, 0)), gradients=WITH_PREFIX),
)


# 16 heads are V2-Lite's, 128 V2's.
EQUAL = (4096,) * 4
RAGGED = (613, 1300, 2048, 77, 900, 3100, 451, 1777, 230, 2500, 1024, 604, 1760)
PROMPTS = (2048,) * 8


def document_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, bounds: list[int], **_: Any
) -> Tensor:
    """What PyTorch offers for ragged documents of these widths: one call each."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        return sdpa(q, k, v, bounds, scale)


def _benchmark(
    name: str,
    lengths: tuple[int, ...],
    *,
    H: int = 16,
    prefix: tuple[int, ...] = (),
    backward: bool = False,
    bounds: bool = True,
    teraflops: int,
) -> Benchmark:
    K, V, T, S = 192, 128, sum(lengths), sum(prefix)
    pairs = sum(n * (n / 2 + m) for n, m in zip_longest(lengths, prefix, fillvalue=0))
    flops = 2.0 * H * (K + V) * pairs * (3.5 if backward else 1)
    # Forward reads q, k, v and writes o; backward reads all of these and do, and writes three gradients.
    num_bytes = 2.0 * H * ((T * (2 * K + 2 * V) + S * (K + V)) * (3 if backward else 1) + backward * T * V)

    def make(device: torch.device) -> dict[str, Any]:
        def draw(rows: int, width: int) -> Tensor:
            return torch.randn(rows, H, width, device=device, dtype=torch.bfloat16)

        def ends(lengths: tuple[int, ...]) -> Tensor:
            return torch.tensor(bounds_of(lengths), device=device, dtype=torch.int32)

        inputs = {"q": draw(T, K), "k": draw(T, K), "v": draw(T, V), "cu_seqlens": ends(lengths), "scale": K**-0.5}
        if prefix:
            inputs |= {"k_prefix": draw(S, K), "v_prefix": draw(S, V), "cu_seqlens_prefix": ends(prefix)}
        return inputs | ({"bounds": bounds_of(lengths)} if bounds else {})

    return Benchmark(
        name=name,
        inputs=make,
        flops=flops,
        bytes=num_bytes,
        gradients=WITH_PREFIX if prefix else ALL,
        backward=backward,
        baselines={"torch": document_by_document} if bounds and not prefix else {},
        target_us=flops / teraflops / 1e6,
    )


BENCHMARKS = (
    _benchmark("H16-4x4096", EQUAL, teraflops=400),
    _benchmark("H16-4x4096-backward", EQUAL, backward=True, teraflops=418),
    _benchmark("H16-4x4096-lengths-unknown-backward", EQUAL, backward=True, bounds=False, teraflops=300),
    _benchmark("H16-ragged16384", RAGGED, teraflops=350),
    _benchmark("H16-ragged16384-backward", RAGGED, backward=True, teraflops=280),
    _benchmark("H16-8x2048", PROMPTS, teraflops=350),
    _benchmark("H128-2x4096-backward", (4096,) * 2, H=128, backward=True, teraflops=418),
    _benchmark("H16-2x2048-after-6144", (2048,) * 2, prefix=(6144,) * 2, teraflops=400),
)
