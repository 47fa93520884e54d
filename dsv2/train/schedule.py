"""Batch size and learning rate of every step, as the tokens seen before it decide (DeepSeek-V2 section 3.1.2).

The paper gives the ends of the batch-size ramp and not its shape: here it is linear in tokens, in whole micro-batches.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from dsv2.config.run import TrainConfig


def batch_sequences(train: TrainConfig, tokens_seen: int) -> int:
    """Sequences of the batch that begins after `tokens_seen` tokens; whole numbers only, so the same everywhere."""
    first, last, ramp_tokens = train.batch_ramp_from, train.batch_sequences, train.batch_ramp_tokens
    if first is None or ramp_tokens is None or tokens_seen >= ramp_tokens:
        return last
    grown = first + (last - first) * tokens_seen // ramp_tokens
    return grown - grown % (train.micro_batch_sequences or 1)


class Schedule:
    """A run's steps, from 0 to `num_steps` - 1. With `train.tokens`, the last is the first to reach so many."""

    def __init__(self, train: TrainConfig, sequence_length: int) -> None:
        self._train, self._sequence_length = train, sequence_length
        self._ramp = self._tokens_of_ramp()
        self.num_steps = train.steps or self._step_at(train.tokens or 0)
        self.num_tokens = self.tokens_before(self.num_steps)

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        tabled = min(step, len(self._ramp) - 1)
        return self._ramp[tabled] + (step - tabled) * self._full_batch_tokens

    def batch_sequences(self, step: int) -> int:
        return batch_sequences(self._train, self.tokens_before(step))

    def learning_rate(self, step: int) -> float:
        """Linear from 0 over the warm-up, then x `decay_factor` at each share of the run's tokens.

        The first step already moves (step + 1 over the warm-up), since a step at rate 0 would be wasted.
        """
        train = self._train
        warmup = min((step + 1) / train.warmup_steps, 1.0) if train.warmup_steps else 1.0
        decays = sum(self.tokens_before(step) / self.num_tokens >= share for share in train.decay_at)
        return train.lr_peak * warmup * train.decay_factor**decays

    @property
    def _full_batch_tokens(self) -> int:
        return self._train.batch_sequences * self._sequence_length

    def _tokens_of_ramp(self) -> list[int]:
        """Tokens before each step of the ramp and before the first step after it, or as far as the run goes."""
        train, tokens = self._train, [0]
        if train.batch_ramp_from is None:
            return tokens
        end = min(train.batch_ramp_tokens or 0, train.tokens or math.inf)
        while tokens[-1] < end and len(tokens) - 1 != train.steps:
            tokens.append(tokens[-1] + batch_sequences(train, tokens[-1]) * self._sequence_length)
        return tokens

    def _step_at(self, num_tokens: int) -> int:
        """The first step before which there are `num_tokens` tokens or more."""
        beyond = num_tokens - self._ramp[-1]
        if beyond <= 0:
            return bisect_left(self._ramp, num_tokens)
        return len(self._ramp) - 1 + -(-beyond // self._full_batch_tokens)
