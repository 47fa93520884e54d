"""Every kernel against its reference in fp64, in every case: outputs, what is written in place, gradients."""

from __future__ import annotations

import pytest
import torch

from dsv2.kernels.case import Case
from tests.kernels.rooms import cases, function, inputs_of, run, upcast
from tests.numerics import BUDGETS, GRADIENT_BUDGETS, rel_err

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = [(r, c, d) for r, c in cases() for d in c.dtypes]
# Each in one of its dtypes (Thue-Morse: in step with no loop that made the cases), in the others when there is time.
INTERPRETED = [
    pytest.param(r, c, d, marks=[] if d == c.dtypes[i.bit_count() % len(c.dtypes)] else pytest.mark.slow)
    for i, (r, c) in enumerate(cases())
    for d in c.dtypes
]
ON_GPU = [(r, c, d) for r, c in cases() for d in c.gpu_dtypes]


def name(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def assert_parity(room: str, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = inputs_of(case, device, dtype)
    expected = run(function(room, "reference", case), {n: upcast(x) for n, x in inputs.items()}, case)
    actual = run(function(room, "kernel", case), inputs, case)
    assert actual.keys() == expected.keys()
    for what, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(actual[what].cpu(), value.cpu().to(actual[what].dtype)), what
            continue
        budget = (GRADIENT_BUDGETS if what.startswith("gradient") else BUDGETS)[dtype]
        error = rel_err(actual[what], value)
        assert error <= budget, f"{what}: relative error {error:.2e} exceeds {budget:.0e}"


# The interpreter computes with numpy, which warns of what becomes of NaN and infinities.
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the same cases run on it")
@pytest.mark.parametrize(("room", "case", "dtype"), INTERPRETED, ids=name)
def test_the_interpreted_kernel_equals_the_reference(room, case, dtype, poisoned) -> None:
    assert_parity(room, case, dtype, "cpu")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("room", "case", "dtype"), ON_GPU, ids=name)
def test_the_kernel_on_the_gpu_equals_the_reference(room, case, dtype, poisoned) -> None:
    assert_parity(room, case, dtype, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("room", "case", "dtype"), ON_GPU, ids=name)
def test_the_kernel_repeats_bit_for_bit(room, case, dtype) -> None:
    first, second = (run(function(room, "kernel", case), inputs_of(case, "cuda", dtype), case) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(value.nan_to_num(), second[what].nan_to_num()), what


@pytest.mark.parametrize(("room", "case", "dtype"), CASES, ids=name)
def test_the_reference_in_its_own_dtype_equals_itself_in_fp64(room, case, dtype) -> None:
    inputs = inputs_of(case, "cpu", dtype)
    call = function(room, "reference", case)
    expected = run(call, {n: upcast(x) for n, x in inputs.items()}, case)
    actual = run(call, inputs, case)
    for what, value in expected.items():
        if value.is_floating_point():
            budget = (GRADIENT_BUDGETS if what.startswith("gradient") else BUDGETS)[dtype]
            assert rel_err(actual[what], value) <= budget, what
        else:
            assert torch.equal(actual[what], value.to(actual[what].dtype)), what
