"""Learning rates and batch sizes of DeepSeek-V2 and V2-Lite, as section 3.1.2 and appendix B state them."""

from pathlib import Path
from typing import Any

import pytest

from dsv2.config.run import TrainConfig, load_pretrain
from dsv2.train.schedule import Schedule, batch_sequences

RECIPES = Path(__file__).parents[2] / "recipes"


def train_config(**changes: Any) -> TrainConfig:
    keys: dict[str, Any] = {"batch_sequences": 1, "lr_peak": 2.4e-4}
    length: dict[str, Any] = {} if "tokens" in changes else {"steps": 10_000}
    return TrainConfig(**(keys | length | changes))


def schedule(**changes: Any) -> Schedule:
    return Schedule(train_config(**changes), sequence_length=32)


def rates(**changes: Any) -> list[float]:
    plan = schedule(**changes)
    return [plan.learning_rate(step) for step in range(plan.num_steps)]


# Learning rate ----------------------------------------------------------------------------------------------------

LITE = {"lr_peak": 4.2e-4, "decay_at": (0.8, 0.9)}


@pytest.mark.parametrize(
    ("changes", "step", "rate"),
    [
        *[({}, step, 2.4e-4) for step in (1999, 2000, 5999)],
        *[({}, step, 7.584e-5) for step in (6000, 8999)],
        *[({}, step, 2.397e-5) for step in (9000, 9999)],
        *[(LITE, step, 4.2e-4) for step in (1999, 7999)],
        *[(LITE, step, 1.327e-4) for step in (8000, 8999)],
        *[(LITE, step, 4.194e-5) for step in (9000, 9999)],
    ],
)
def test_the_plateaus_are_the_papers(changes: dict[str, Any], step: int, rate: float) -> None:
    assert schedule(**changes).learning_rate(step) == pytest.approx(rate, rel=3e-4)


def test_the_rate_rises_linearly_over_2000_steps() -> None:
    assert rates()[:2000] == pytest.approx([2.4e-4 * (step + 1) / 2000 for step in range(2000)])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(warmup_steps=0)[0] == 2.4e-4


def test_without_decays_the_rate_stays() -> None:
    assert set(rates(decay_at=())[2000:]) == {2.4e-4}


@pytest.mark.parametrize("steps", [10, 100, 5000])
def test_a_decay_falls_on_its_share_of_the_run(steps: int) -> None:
    of_steps = rates(steps=steps, warmup_steps=0)
    falls = [s for s in range(1, steps) if of_steps[s] < of_steps[s - 1]]
    assert falls == [steps * 6 // 10, steps * 9 // 10]


def test_a_run_shorter_than_its_warm_up_still_decays() -> None:
    assert rates(steps=1000)[999] == pytest.approx(2.4e-4 * 0.5 * 0.316**2)


def test_where_batches_grow_a_decay_falls_on_its_share_of_the_tokens() -> None:
    ramp = {"batch_sequences": 40, "micro_batch_sequences": 10, "batch_ramp_from": 10, "batch_ramp_tokens": 100}
    plan = Schedule(train_config(steps=20, warmup_steps=0, decay_at=(0.6,), **ramp), sequence_length=1)
    assert [plan.batch_sequences(step) for step in range(20)] == [10] * 4 + [20, 20, 30] + [40] * 13
    # 60% of these 630 tokens are reached before step 14; 60% of the steps would be step 12.
    assert [step for step in range(20) if plan.learning_rate(step) < 2.4e-4] == list(range(14, 20))


# Batch size -------------------------------------------------------------------------------------------------------

V2_RAMP = {"batch_sequences": 9216, "micro_batch_sequences": 1, "batch_ramp_from": 2304}
V2_RAMP |= {"batch_ramp_tokens": 225_000_000_000}


@pytest.mark.parametrize(
    ("billions", "sequences"), [(0, 2304), (75, 4608), (112.5, 5760), (150, 6912), (225, 9216), (8100, 9216)]
)
def test_the_batch_of_v2_grows_from_2304_to_9216_over_225_billion_tokens(billions: float, sequences: int) -> None:
    assert batch_sequences(train_config(**V2_RAMP), int(billions * 1e9)) == sequences


def test_batches_never_shrink_and_are_whole_micro_batches() -> None:
    plan = schedule(batch_sequences=40, micro_batch_sequences=8, batch_ramp_from=8, batch_ramp_tokens=32_000)
    sizes = [plan.batch_sequences(step) for step in range(90)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 16, 24, 32, 40}


@pytest.mark.parametrize("ramp", [{}, V2_RAMP | {"batch_ramp_tokens": 10**8}], ids=["constant", "ramp"])
def test_tokens_before_a_step_are_those_of_all_batches_before_it(ramp: dict[str, Any]) -> None:
    plan, tokens = schedule(**ramp), 0
    for step in range(2000):
        assert plan.tokens_before(step) == tokens
        assert plan.batch_sequences(step) == batch_sequences(train_config(**ramp), tokens)
        tokens += plan.batch_sequences(step) * 32


# Length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (32 * 4, 1), (32 * 4 + 1, 2), (32 * 40, 10)])
def test_tokens_are_rounded_up_to_whole_batches(tokens: int, steps: int) -> None:
    plan = schedule(tokens=tokens, batch_sequences=4)
    assert (plan.num_steps, plan.num_tokens) == (steps, steps * 32 * 4)


@pytest.mark.parametrize("tokens", [1, 64, 65, 5_000, 32_000, 32_001, 100_000])
def test_a_run_in_tokens_ends_with_the_first_step_that_reaches_them(tokens: int) -> None:
    ramp = {"batch_sequences": 8, "micro_batch_sequences": 2, "batch_ramp_from": 2, "batch_ramp_tokens": 32_000}
    plan = schedule(tokens=tokens, **ramp)
    assert plan.tokens_before(plan.num_steps - 1) < tokens <= plan.num_tokens


def test_a_run_in_steps_may_end_within_its_ramp() -> None:
    plan = Schedule(train_config(steps=3, **V2_RAMP), sequence_length=4096)
    assert plan.num_tokens == sum(plan.batch_sequences(step) for step in range(3)) * 4096


@pytest.mark.parametrize(("name", "steps_in_thousands"), [("v2", 219.6), ("v2-lite", 302.0)])
def test_the_published_recipes_take_as_many_steps_as_follow_from_them(name: str, steps_in_thousands: float) -> None:
    # (8.1T - 225B) / (9216 * 4096) is 208.6K after a ramp of 11.0K; 5.7T / (4608 * 4096) is 302.0K.
    cfg = load_pretrain(RECIPES / f"{name}.toml")
    plan = Schedule(cfg.train, cfg.data.sequence_length)
    assert plan.num_steps / 1000 == pytest.approx(steps_in_thousands, abs=0.1)
