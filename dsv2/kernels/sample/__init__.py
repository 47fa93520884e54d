"""The next token from logits: penalties, temperature, min-p, top-k and top-p, drawn by the Gumbel trick."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import FLOATS, REFERENCE_FLOATS, check_dtype, check_same_device, check_shape, use_kernel


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row, each row by its own parameters, in the order of vLLM.

    Penalties change the logits, temperature divides them, and of their softmax min-p, top-k and top-p keep, one after
    the other, the most probable tokens. Among equal logits the lowest index counts as more probable.

    Args:
        logits: [B, W], float32, float16 or bfloat16 (float64 in the reference); rows may be strided. -inf is never
            chosen unless nothing else is there; NaN counts as -inf.
        temperature: [B] float32; 0 takes the largest logit, and looks at no other parameter but the penalties.
        top_k: [B] int32, keep so many; 0 or less keeps all.
        top_p: [B] float32, keep the smallest set whose mass, of what min-p and top-k left, reaches top_p; a token goes
            once those before it suffice. 1 keeps all.
        min_p: [B] float32, keep tokens with at least so much of the largest probability; 0 keeps all.
        seed: [B] int64.
        step: [B] int64, how many tokens the request has. Noise comes from Philox 4x32-10 with key `seed` and counter
            (token // 4, step), so a row draws the same whatever else is in the batch.
        output_counts: [B, W] int32, how often the request has generated each token.
        prompt_mask: [B, W] bool, the tokens of its prompt.
        presence_penalty: [B] float32, subtracted from the logits of generated tokens. Needs `output_counts`.
        frequency_penalty: [B] float32, subtracted once for each time. Needs `output_counts`.
        repetition_penalty: [B] float32, divides positive and multiplies negative logits of tokens generated or in the
            prompt, before the other two. Needs `output_counts` or `prompt_mask`.

    Returns:
        ids: [B] int64.
        log_probs: [B] float32, of the chosen tokens under softmax(logits): no penalty, temperature 1, nothing cut.

    Nothing is differentiable, nothing is written in place. Parameters outside their ranges are not looked for, which
    would wait for the GPU; they give some token. Raises ValueError where the arguments do not match.
    """
    check_shape("logits", logits, None, None)
    B, W = logits.shape
    if not W:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected at least one token")
    rows = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seed": (seed, torch.int64),
        "step": (step, torch.int64),
        "presence_penalty": (presence_penalty, torch.float32),
        "frequency_penalty": (frequency_penalty, torch.float32),
        "repetition_penalty": (repetition_penalty, torch.float32),
    }
    tables = {"output_counts": (output_counts, torch.int32), "prompt_mask": (prompt_mask, torch.bool)}
    for arguments, shape in ((rows, (B,)), (tables, (B, W))):
        for name, (x, dtype) in arguments.items():
            if x is not None:
                check_shape(name, x, *shape)
                check_dtype(name, x, dtype)
                check_same_device(name, x, "logits", logits)
    if output_counts is None:
        _check_absent("presence_penalty", presence_penalty, "output_counts")
        _check_absent("frequency_penalty", frequency_penalty, "output_counts")
        if prompt_mask is None:
            _check_absent("repetition_penalty", repetition_penalty, "output_counts or prompt_mask")
    if not use_kernel(logits):
        check_dtype("logits", logits, *REFERENCE_FLOATS)
        from dsv2.kernels.sample.reference import sample as run
    else:
        check_dtype("logits", logits, *FLOATS)
        from dsv2.kernels.sample.kernel import sample as run
    return run(
        logits, temperature, top_k, top_p, min_p, seed, step, output_counts, prompt_mask, presence_penalty,
        frequency_penalty, repetition_penalty,
    )  # fmt: skip


def _check_absent(name: str, x: Tensor | None, needed: str) -> None:
    if x is not None:
        raise ValueError(f"{name} is given without {needed}, expected both")
