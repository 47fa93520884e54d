"""cross_entropy and token_log_probs beyond parity: independent oracles, chunks, ignored and impossible targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.data.batches import IGNORED
from dsv2.kernels.cross_entropy import cross_entropy, kernel, reference, token_log_probs
from tests.numerics import GRADIENT_BUDGETS, assert_close, rel_err

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head(T: int = 21, D: int = 16, W: int = 97, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets, of which every fourth is ignored; the first two want gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).to(DEVICE, dtype).requires_grad_() for n in (T, W))
    targets = torch.randint(W, (T,), generator=generator)
    targets[::4] = IGNORED
    return hidden, weight, targets.to(DEVICE)


def assert_same_gradients(loss: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    assert all(rel_err(a, e) <= GRADIENT_BUDGETS[a.dtype] for a, e in pairs)


@pytest.mark.parametrize("implementation", [cross_entropy, kernel.cross_entropy, reference.cross_entropy])
def test_the_loss_is_that_of_torch(implementation: Callable[..., Tensor]) -> None:
    hidden, weight, targets = head()
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")
    loss = implementation(hidden, weight, targets, ignore_index=IGNORED)
    assert_close(loss, expected)
    assert loss.dtype == torch.float32
    assert_same_gradients(loss, expected, hidden, weight)


def test_by_default_it_ignores_what_batches_ignore() -> None:
    hidden, weight, targets = head()
    assert_close(cross_entropy(hidden, weight, targets), cross_entropy(hidden, weight, targets, ignore_index=IGNORED))


@pytest.mark.parametrize("implementation", [token_log_probs, kernel.token_log_probs, reference.token_log_probs])
def test_token_log_probs_are_those_of_torch(implementation: Callable[..., Tensor]) -> None:
    hidden, weight, targets = head()
    targets = targets.clamp(min=0)
    expected = -F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    log_probs = implementation(hidden, weight, targets)
    assert_close(log_probs, expected)
    factors = torch.linspace(-1, 2, len(targets), device=DEVICE)
    assert_same_gradients((log_probs * factors).sum(), (expected * factors).sum(), hidden, weight)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_size_of_chunks_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head()
    whole = kernel.cross_entropy(hidden, weight, targets)
    log_probs = kernel.token_log_probs(hidden, weight, targets.clamp(min=0))
    monkeypatch.setattr(kernel, "CHUNK_BYTES", rows * weight.shape[0] * 4)
    assert_close(chunked := kernel.cross_entropy(hidden, weight, targets), whole)
    assert_same_gradients(chunked, whole, hidden, weight)
    assert_close(chunked := kernel.token_log_probs(hidden, weight, targets.clamp(min=0)), log_probs)
    assert_same_gradients(chunked.sum(), log_probs.sum(), hidden, weight)


def test_a_chunk_of_logits_of_v2_takes_less_than_half_a_gigabyte() -> None:
    hidden, weight = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (16384, 102400))
    chunks = [(chunk, logits.nbytes) for chunk, logits in kernel._chunks(hidden, weight)]
    assert [chunk for chunk, _ in chunks] == [slice(i, i + 2048) for i in range(0, 16384, 2048)]
    assert all(2**28 < nbytes <= 2**29 for _, nbytes in chunks)


@pytest.mark.parametrize("factor", [0.0, 1 / 3, -7.0])
def test_the_incoming_gradient_scales_both_gradients_in_fp32(factor: float) -> None:
    hidden, weight, targets = head(dtype=torch.float16)
    loss = kernel.cross_entropy(hidden, weight, targets)
    whole = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * factor, (hidden, weight))
    # Twice the rounding of fp16 at most; a factor that were rounded too would show.
    assert all(rel_err(s, g.double() * factor) < 2**-11 for g, s in zip(whole, scaled, strict=True))


def test_gradients_that_nobody_wants_are_not_made() -> None:
    hidden, weight, targets = head()
    with torch.no_grad():
        nothing = kernel._loss(hidden, weight, targets, IGNORED, False, False)
    assert [x.numel() for x in nothing] == [1, 0, 0]
    one = kernel._loss(hidden, weight, targets, IGNORED, True, False)
    assert [x.numel() for x in one] == [1, hidden.numel(), 0]
    assert not cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_ignored_tokens_get_no_gradient_and_give_none() -> None:
    hidden, weight, targets = head()
    dhidden, dweight = torch.autograd.grad(kernel.cross_entropy(hidden, weight, targets), (hidden, weight))
    counted = targets != IGNORED
    assert not dhidden[~counted].any()
    assert dhidden[counted].any(1).all()
    loss = kernel.cross_entropy(hidden[counted], weight, targets[counted])
    assert_close(dweight, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("implementation", [cross_entropy, kernel.cross_entropy, reference.cross_entropy])
def test_nan_in_an_ignored_token_reaches_nothing(implementation: Callable[..., Tensor]) -> None:
    hidden, weight, targets = head()
    clean = torch.autograd.grad(implementation(hidden, weight, targets), (hidden, weight))
    with torch.no_grad():
        hidden[targets == IGNORED] = float("nan")
    broken = torch.autograd.grad(implementation(hidden, weight, targets), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(clean, broken, strict=True))


@pytest.mark.parametrize("wrong", [97, -1, 2**40, -(2**40)])
def test_the_kernel_makes_a_target_outside_the_vocabulary_nan_and_reads_nothing_there(wrong: int) -> None:
    hidden, weight, targets = head()
    targets = targets.clamp(min=0)
    targets[5] = wrong
    assert kernel.cross_entropy(hidden, weight, targets).isnan()
    log_probs = kernel.token_log_probs(hidden, weight, targets)
    assert log_probs.isnan().nonzero().flatten().tolist() == [5]
    (dhidden,) = torch.autograd.grad(log_probs.sum(), hidden)
    assert dhidden.isnan().all(1).nonzero().flatten().tolist() == [5]


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would wait for it")
@pytest.mark.parametrize("function", [cross_entropy, token_log_probs])
@pytest.mark.parametrize("wrong", [97, -1])
def test_on_the_cpu_a_target_outside_the_vocabulary_is_an_error(function: Callable[..., Tensor], wrong: int) -> None:
    hidden, weight, targets = head()
    targets = targets.clamp(min=0)
    targets[5] = wrong
    with pytest.raises(ValueError, match=f"targets hold {wrong}, expected ids from 0 to 96"):
        function(hidden, weight, targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(21)}, r"hidden has shape \(21,\), expected \(any, any\)"),
        ({"weight": torch.zeros(97, 15)}, r"weight has shape \(97, 15\), expected \(any, 16\)"),
        ({"weight": torch.zeros(0, 16)}, r"weight has shape \(0, 16\), expected at least one row"),
        ({"weight": torch.zeros(97, 16, dtype=torch.float16)}, "weight is float16, expected float32"),
        ({"targets": torch.zeros(20, dtype=torch.int64)}, r"targets has shape \(20,\), expected \(21\)"),
        ({"targets": torch.zeros(21, dtype=torch.int32)}, "targets is int32, expected int64"),
        ({"targets": torch.zeros(21, dtype=torch.int64, device="meta")}, "targets is on meta"),
    ],
)
@pytest.mark.parametrize("function", [cross_entropy, token_log_probs])
def test_arguments_that_do_not_match_are_errors(
    function: Callable[..., Tensor], changes: dict[str, Any], message: str
) -> None:
    arguments = dict(zip(("hidden", "weight", "targets"), head(), strict=True))
    changed = {n: x if x.is_meta else x.to(DEVICE) for n, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **changed})


def test_the_operators_keep_their_promises_to_torch_compile() -> None:
    hidden, weight, targets = head(5)
    torch.library.opcheck(kernel._loss.op, (hidden, weight, targets, IGNORED, True, True))
    torch.library.opcheck(kernel._log_probs.op, (hidden, weight, targets.clamp(min=0)))
    lses = torch.zeros(5, device=DEVICE)
    detached = (hidden.detach(), weight.detach(), targets.clamp(min=0), lses, lses)
    torch.library.opcheck(kernel._log_probs_backward.op, (*detached, True, False))
    torch.library.opcheck(kernel._scaled.op, (hidden.detach(), torch.ones((), device=DEVICE), torch.float16))
