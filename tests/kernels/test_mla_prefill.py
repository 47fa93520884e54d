"""Attention inside packed documents: their independence, prefixes, the choice of an implementation, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels.mla_prefill import mla_prefill, plan
from dsv2.kernels.mla_prefill.cases import bounds_of
from dsv2.kernels.mla_prefill.reference import mla_prefill as reference
from tests.numerics import BUDGETS, GRADIENT_BUDGETS, rel_err

ROOT = Path(__file__).parents[2]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(*lengths: int, H: int = 2, heads: int = 2, K: int = 48, V: int = 32) -> dict[str, Any]:
    T = sum(lengths)
    return {
        "q": draw(T, H, K, seed=1),
        "k": draw(T, heads, K, seed=2),
        "v": draw(T, heads, V, seed=3),
        "cu_seqlens": torch.tensor(bounds_of(lengths), dtype=torch.int32),
        "scale": K**-0.5,
    }


def kernel(**arguments: Any) -> Tensor:
    from dsv2.kernels.mla_prefill.kernel import mla_prefill as run

    return run(**arguments)


# What it computes -------------------------------------------------------------------------------------------------


def test_a_document_alone_gives_what_it_gives_among_others() -> None:
    a = packed(7, 130, 3)
    whole = kernel(**a)
    rows = slice(7, 137)
    alone = kernel(**(a | {n: a[n][rows] for n in "qkv"} | {"cu_seqlens": torch.tensor([0, 130]).int()}))
    assert rel_err(whole[rows], alone) <= BUDGETS[torch.float32]


def test_rows_do_not_see_later_rows() -> None:
    a = packed(100)
    before = kernel(**a)
    for name in "qkv":
        a[name][70:] = 1e4
    assert torch.equal(kernel(**a)[:70], before[:70])


# The interpreter computes with numpy, which warns of what becomes of the NaN.
computes_with_nan = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")


@computes_with_nan
@pytest.mark.parametrize("document", range(4))
def test_nan_in_a_document_reaches_no_output_of_another(document: int) -> None:
    lengths = (65, 2, 64, 70)
    a = packed(*lengths)
    start, stop = bounds_of(lengths)[document : document + 2]
    for name in "qkv":
        a[name][start:stop] = float("nan")
    out = kernel(**a)
    assert out[start:stop].isnan().all()
    assert out[:start].isfinite().all() and out[stop:].isfinite().all()


@computes_with_nan
@pytest.mark.parametrize("name", ["q", "k", "v", "gradient"])
def test_nan_in_a_document_changes_no_gradient_of_another(name: str) -> None:
    a = packed(17, 5, 20, H=1, heads=1, K=16, V=16)
    leaves = {n: a[n] for n in "qkv"} | {"gradient": draw(42, 1, 16, seed=6)}
    broken = leaves | {name: leaves[name].index_fill(0, torch.arange(17, 22), float("nan"))}

    def gradients(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = {n: leaves[n].clone().requires_grad_() for n in "qkv"}
        return torch.autograd.grad(kernel(**(a | x)), list(x.values()), leaves["gradient"])

    for clean, found in zip(gradients(leaves), gradients(broken), strict=True):
        assert torch.equal(found[:17], clean[:17]) and torch.equal(found[22:], clean[22:])


@computes_with_nan
def test_nan_in_a_prefix_reaches_no_output_of_another_document() -> None:
    a = packed(3, 4, 5) | {
        "k_prefix": draw(30, 2, 48, seed=4),
        "v_prefix": draw(30, 2, 32, seed=5),
        "cu_seqlens_prefix": torch.tensor([0, 10, 20, 30], dtype=torch.int32),
    }
    for name in ("k_prefix", "v_prefix"):
        a[name][10:20] = float("nan")
    out = kernel(**a)
    assert out[3:7].isnan().all()
    assert out[:3].isfinite().all() and out[7:].isfinite().all()


@pytest.mark.parametrize("cut", [1, 64, 100, 149])
def test_a_document_after_its_own_beginning_as_prefix_gives_the_same_rows_and_gradients(cut: int) -> None:
    a = packed(150)
    leaves = {n: a[n].clone().requires_grad_() for n in "qkv"}
    dy = draw(150, 2, 32, seed=6)
    dy[:cut] = 0
    whole = kernel(**(a | leaves))
    expected = torch.autograd.grad(whole, list(leaves.values()), dy)
    tails = {n: a[n][cut:].clone().requires_grad_() for n in "qkv"}
    heads = {f"{n}_prefix": a[n][:cut].clone().requires_grad_() for n in "kv"}
    ends = {
        "cu_seqlens": torch.tensor([0, 150 - cut], dtype=torch.int32),
        "cu_seqlens_prefix": torch.tensor([0, cut], dtype=torch.int32),
    }
    rest = kernel(**(a | tails | heads | ends))
    assert rel_err(rest, whole[cut:]) <= BUDGETS[torch.float32]
    dq, dk, dv, dk_prefix, dv_prefix = torch.autograd.grad(rest, [*tails.values(), *heads.values()], dy[cut:])
    for actual, wanted in (
        (dq, expected[0][cut:]),
        (torch.cat((dk_prefix, dk)), expected[1]),
        (torch.cat((dv_prefix, dv)), expected[2]),
    ):
        assert rel_err(actual, wanted) <= GRADIENT_BUDGETS[torch.float32]


def test_shared_heads_give_what_repeated_heads_give() -> None:
    a = packed(40, 9, H=6, heads=2)
    repeated = {n: a[n].repeat_interleave(3, 1) for n in "kv"}
    assert rel_err(kernel(**a), kernel(**(a | repeated))) <= BUDGETS[torch.float32]


def test_keys_broadcast_over_heads_need_no_copy_by_the_caller() -> None:
    a = packed(20)
    a["k"] = a["k"][:, :1].expand(-1, 2, -1)
    assert rel_err(kernel(**a), reference(**a)) <= BUDGETS[torch.float32]


def test_gradients_are_right_in_float64() -> None:
    a = {n: x.double()[..., :3] if n in "qkv" else x for n, x in packed(2, 0, 1).items()}
    leaves = [a[n].requires_grad_() for n in "qkv"]
    torch.autograd.gradcheck(lambda q, k, v: reference(q, k, v, a["cu_seqlens"], 0.7), leaves)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (3, 9, 0, 9, 3), (5,), (0, 0)])
def test_pytorchs_attention_gives_what_the_reference_gives(lengths: tuple[int, ...]) -> None:
    a = packed(*lengths, H=4)
    leaves = [a[n].requires_grad_() for n in "qkv"]
    out = mla_prefill(**a, bounds=bounds_of(lengths))
    expected = reference(**a)
    assert rel_err(out, expected) <= BUDGETS[torch.float32]
    dy = draw(*out.shape, seed=6)
    for actual, wanted in zip(
        torch.autograd.grad(out, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert rel_err(actual, wanted) <= GRADIENT_BUDGETS[torch.float32]


# On a GPU ---------------------------------------------------------------------------------------------------------


def test_backward_kernels_compile_and_fit_shared_memory() -> None:
    """What a GPU is asked for grows with what covers the widths; 320 channels may lie in 416."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_prefill", "dkv,192,128", "dq,192,128", "dq,160,160"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    assert max(line["shared_bytes"] for line in found) <= 232_448


def test_the_hopper_kernel_compiles_into_matrix_instructions_that_overlap() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_hopper", "mla_prefill"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (json.loads(line) for line in done.stdout.splitlines())
    assert found["shared_bytes"] <= 232_448
    # Two warp groups; scores and values before the loop, in it and after it; 192 channels or 128 keys, 16 at a time.
    assert found["matrix_instructions"] == 2 * (12 + 12 + 8 + 8)
    assert not found["serialised"]
    assert not found["spilled_bytes"]


# As an operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_operator_keeps_the_promises_that_compilation_needs(with_prefix: bool) -> None:
    import dsv2.kernels.mla_prefill.kernel as file

    a = packed(5, 9)
    prefix: list[Tensor | None] = [None, None, None]
    if with_prefix:
        prefix = [draw(6, 2, 48), draw(6, 2, 32), torch.tensor([0, 2, 6], dtype=torch.int32)]
    arguments = [a["q"], a["k"], a["v"], a["cu_seqlens"], a["scale"], *prefix]
    for x in arguments:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    torch.library.opcheck(file._forward.op, tuple(arguments))


def test_launches_depend_on_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv2.kernels.mla_prefill.kernel as file

    grids: list[Any] = []
    for name in ("fwd", "dq", "dkv"):
        found = getattr(file, f"_mla_prefill_{name}_kernel")

        class Recorded:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: Any) -> Any:
                grids.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(file, f"_mla_prefill_{name}_kernel", Recorded(found))
    seen = []
    for lengths in ((200, 0, 56), (64, 64, 128), (0, 0, 256)):
        a = packed(*lengths, H=1, heads=1, K=16, V=16)
        out = kernel(**(a | {n: a[n].requires_grad_() for n in "qkv"}))
        out.sum().backward()
        assert rel_err(out, reference(**a)) <= BUDGETS[torch.float32]
        seen.append(grids.copy())
        grids.clear()
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 3


@pytest.mark.parametrize(("width", "expected"), [(192, (128, 64)), (128, (128, 0)), (48, (32, 16)), (20, (16, 16)),
                                                 (8, (16, 0)), (16, (16, 0)), (96, (64, 32)), (224, (128, 128)),
                                                 (256, (256, 0)), (17, (16, 16))])  # fmt: skip
def test_widths_lie_in_powers_of_two(width: int, expected: tuple[int, int]) -> None:
    from dsv2.kernels.mla_prefill.kernel import constants

    found = constants("fwd", torch.device("cpu"), width, 64)
    assert (found["BK"], found["BK2"]) == expected


# What runs --------------------------------------------------------------------------------------------------------


def half(*lengths: int, **changes: int) -> tuple[Tensor, Tensor, Tensor]:
    a = packed(*lengths, **{"K": 192, "V": 128} | changes)
    q, k, v = (a[n].bfloat16() for n in "qkv")
    return q.requires_grad_(), k, v


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv2.kernels.mla_prefill as room

    monkeypatch.setattr(room, "use_kernel", lambda x: True)
    monkeypatch.setattr(room, "capability", lambda device: (9, 0))


def test_equal_documents_that_get_gradients_go_to_cudnn(hopper) -> None:
    x = half(256, 256)
    assert plan(*x, [0, 256, 512]) == "cudnn-batched"
    assert plan(*x, [0, 512]) == "cudnn-batched"


def test_everything_else_on_the_gpu_goes_to_the_kernel(hopper) -> None:
    x = half(256, 256)
    bounds = [0, 256, 512]
    assert plan(*x, None) == "triton"
    assert plan(*x, [0, 255, 512]) == "triton"
    assert plan(*half(50, 50), [0, 50, 100]) == "triton"
    assert plan(*half(256, 256, V=136), bounds) == "triton"
    assert plan(*x, bounds, has_prefix=True) == "triton"
    assert plan(x[0].detach(), *x[1:], bounds) == "triton"
    with torch.no_grad():
        assert plan(*x, bounds) == "triton"


def test_cudnn_stays_away_where_results_must_repeat(hopper) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert plan(*half(256, 256), [0, 256, 512]) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_kernel_pytorch_runs_where_bounds_are_known() -> None:
    x = half(4, 4)
    assert plan(*x, [0, 4, 8]) == "sdpa"
    assert plan(*x, [0, 4, 8], has_prefix=True) == plan(*x, None) == "reference"


def test_wide_dtypes_do_not_go_to_the_kernel(hopper) -> None:
    q, k, v = (x.float() for x in half(256, 256))
    assert plan(q, k, v, [0, 256, 512]) == "sdpa"
    assert plan(q, k, v, None) == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(256, 256), (1, 300, 0, 64, 65)])
def test_on_the_gpu_both_implementations_agree_with_the_reference(lengths: tuple[int, ...]) -> None:
    a = packed(*lengths, H=4, K=192, V=128)
    a |= {n: a[n].cuda().bfloat16() for n in "qkv"} | {"cu_seqlens": a["cu_seqlens"].cuda()}
    wide = {n: a[n].double().requires_grad_() for n in "qkv"}
    expected = reference(**(a | wide))
    dy = draw(*expected.shape, seed=6).cuda()
    wanted = torch.autograd.grad(expected, list(wide.values()), dy.double())
    for bounds in (bounds_of(lengths), None):
        leaves = {n: a[n].clone().requires_grad_() for n in "qkv"}
        out = mla_prefill(**(a | leaves), bounds=bounds)
        assert rel_err(out, expected) <= BUDGETS[torch.bfloat16]
        for actual, want in zip(torch.autograd.grad(out, list(leaves.values()), dy.bfloat16()), wanted, strict=True):
            assert rel_err(actual, want) <= GRADIENT_BUDGETS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_with_other_lengths() -> None:
    a = packed(100, 28, K=192, V=128)
    x = a | {n: a[n].cuda().bfloat16() for n in "qkv"} | {"cu_seqlens": a["cu_seqlens"].cuda()}
    with torch.no_grad():
        mla_prefill(**x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mla_prefill(**x)
        x["cu_seqlens"].copy_(torch.tensor([0, 3, 128]))
        graph.replay()
        assert rel_err(out, reference(**x)) <= BUDGETS[torch.bfloat16]


# Bad input --------------------------------------------------------------------------------------------------------


PREFIX = {"k_prefix": draw(4, 2, 48), "v_prefix": draw(4, 2, 32), "cu_seqlens_prefix": torch.tensor([0, 2, 4]).int()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": draw(5, 2)}, r"q has shape \(5, 2\), expected \(any, any, any\)"),
        ({"k": draw(4, 2, 48)}, r"k has shape \(4, 2, 48\), expected \(5, any, 48\)"),
        ({"v": draw(5, 1, 32)}, r"v has shape \(5, 1, 32\), expected \(5, 2, any\)"),
        ({"k": draw(5, 3, 48), "v": draw(5, 3, 32)}, "k has 3 heads, expected a divisor of q's 2"),
        ({"v": draw(5, 2, 300)}, "q has 48 channels a head and v 300, expected 1 to 256"),
        ({"v": draw(5, 2, 32).double()}, "v is float64, expected float32"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens is int64, expected int32"),
        ({"cu_seqlens": torch.tensor([]).int()}, "cu_seqlens is empty, expected 0 at least"),
        ({"bounds": [0, 5]}, r"bounds are 2 numbers, \[0, 5\] ..., expected 3 from 0 to 5"),
        ({"bounds": [0, 2, 6]}, r"bounds are 3 numbers, \[0, 2, 6\] ..., expected 3 from 0 to 5"),
        ({"k_prefix": PREFIX["k_prefix"]}, "some are None, expected all three or none"),
        (PREFIX | {"k_prefix": draw(4, 2, 47)}, r"k_prefix has shape \(4, 2, 47\), expected \(any, 2, 48\)"),
        (PREFIX | {"v_prefix": draw(3, 2, 32)}, r"v_prefix has shape \(3, 2, 32\), expected \(4, 2, 32\)"),
        (
            PREFIX | {"cu_seqlens_prefix": torch.tensor([0, 4]).int()},
            r"cu_seqlens_prefix has shape \(2,\), expected \(3\)",
        ),
        ({"k": draw(5, 2, 48).to("meta")}, "k is on meta, q on cpu: expected one device"),
    ],
)
def test_arguments_that_do_not_match_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mla_prefill(**(packed(2, 3) | changes))
