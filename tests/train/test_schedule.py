"""The learning rates of DeepSeek-V2 and V2-Lite, as sections 3.1.2 and appendix B state them."""

from typing import Any

import pytest

from dsv2.config.run import TrainConfig
from dsv2.train.schedule import learning_rate


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 10_000, "batch_sequences": 1, "lr_peak": 2.4e-4} | changes))


V2 = train_config()
LITE = train_config(lr_peak=4.2e-4, decay_at=(0.8, 0.9))


@pytest.mark.parametrize(
    ("train", "step", "rate"),
    [
        *[(V2, step, 2.4e-4) for step in (1999, 2000, 5999)],
        *[(V2, step, 7.584e-5) for step in (6000, 8999)],
        *[(V2, step, 2.397e-5) for step in (9000, 9999)],
        *[(LITE, step, 4.2e-4) for step in (1999, 7999)],
        *[(LITE, step, 1.327e-4) for step in (8000, 8999)],
        *[(LITE, step, 4.194e-5) for step in (9000, 9999)],
    ],
)
def test_the_plateaus_are_the_papers(train: TrainConfig, step: int, rate: float) -> None:
    assert learning_rate(train, step) == pytest.approx(rate, rel=3e-4)


def test_the_rate_rises_linearly_over_2000_steps() -> None:
    rates = [learning_rate(V2, step) for step in range(2000)]
    assert rates == pytest.approx([2.4e-4 * (step + 1) / 2000 for step in range(2000)])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(train_config(warmup_steps=0), 0) == 2.4e-4


def test_without_decays_the_rate_stays() -> None:
    assert {learning_rate(train_config(decay_at=()), step) for step in range(2000, 10_000)} == {2.4e-4}


@pytest.mark.parametrize("steps", [10, 100, 5000])
def test_a_decay_falls_on_its_share_of_the_steps(steps: int) -> None:
    train = train_config(steps=steps, warmup_steps=0)
    falls = [s for s in range(1, steps) if learning_rate(train, s) < learning_rate(train, s - 1)]
    assert falls == [steps * 6 // 10, steps * 9 // 10]


def test_a_run_shorter_than_its_warm_up_still_decays() -> None:
    train = train_config(steps=1000)
    assert learning_rate(train, 999) == pytest.approx(2.4e-4 * 0.5 * 0.316**2)
