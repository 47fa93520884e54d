"""The language-model head with its loss (cross-entropy of section 3.1.1), without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import FLOATS, REFERENCE_FLOATS, check_dtype, check_same_device, check_shape, use_kernel


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats.

    Args:
        hidden: [T, D], float32, float16 or bfloat16 (float64 in the reference).
        weight: [W, D], the head's, of hidden's dtype and on its device.
        targets: [T] int64, ids in [0, W); tokens whose target is `ignore_index` add nothing, whatever their rows hold.

    Returns a float32 scalar. Differentiable in hidden and weight, once. Logits are rounded to hidden's dtype, as by a
    linear layer; softmax and sum are float32, and the weight's gradient is accumulated in float32. The kernel goes
    through the tokens in chunks and makes the gradients in the same pass, so a loss that is never differentiated
    should be computed without gradients enabled.

    Raises ValueError where the arguments do not match and, on the CPU, for other targets outside [0, W). On a GPU,
    where looking would wait, such a token makes the loss NaN.
    """
    _check(hidden, weight, targets)
    if not use_kernel(hidden):
        from dsv2.kernels.cross_entropy.reference import cross_entropy as run
    else:
        from dsv2.kernels.cross_entropy.kernel import cross_entropy as run
    if targets.device.type == "cpu":
        _check_targets(targets[targets != ignore_index], len(weight))
    return run(hidden, weight, targets, ignore_index)


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each token, in nats: what alignment compares between policies.

    Args:
        hidden: [T, D], float32, float16 or bfloat16 (float64 in the reference).
        weight: [W, D], the head's, of hidden's dtype and on its device.
        targets: [T] int64, ids in [0, W).

    Returns [T] float32. Differentiable in hidden and weight, once: the backward pass computes the logits again.
    Otherwise as `cross_entropy`; a token whose target is outside [0, W) gets NaN on a GPU.
    """
    _check(hidden, weight, targets)
    if not use_kernel(hidden):
        from dsv2.kernels.cross_entropy.reference import token_log_probs as run
    else:
        from dsv2.kernels.cross_entropy.kernel import token_log_probs as run
    if targets.device.type == "cpu":
        _check_targets(targets, len(weight))
    return run(hidden, weight, targets)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    check_shape("hidden", hidden, None, None)
    check_shape("weight", weight, None, hidden.shape[1])
    check_shape("targets", targets, len(hidden))
    if not len(weight):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected at least one row")
    check_dtype("weight", weight, hidden.dtype)
    check_dtype("targets", targets, torch.int64)
    check_same_device("weight", weight, "hidden", hidden)
    check_same_device("targets", targets, "hidden", hidden)
    check_dtype("hidden", hidden, *(FLOATS if use_kernel(hidden) else REFERENCE_FLOATS))


def _check_targets(targets: Tensor, num_ids: int) -> None:
    wrong = targets[(targets < 0) | (targets >= num_ids)]
    if len(wrong):
        raise ValueError(f"targets hold {int(wrong[0])}, expected ids from 0 to {num_ids - 1}")
