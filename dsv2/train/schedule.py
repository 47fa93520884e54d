"""The learning rate as a pure function of the step (DeepSeek-V2 section 3.1.2)."""

from __future__ import annotations

from dsv2.config.run import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear from 0 over the warm-up, then x `decay_factor` at each share of the steps.

    The first step already moves (step + 1 over the warm-up), since a step at rate 0 would be wasted.
    """
    warmup = min((step + 1) / train.warmup_steps, 1.0) if train.warmup_steps else 1.0
    decays = sum(step >= share * train.steps for share in train.decay_at)
    return train.lr_peak * warmup * train.decay_factor**decays
