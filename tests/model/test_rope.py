"""Rotary embedding: which channels pair up, which frequencies YaRN stretches, and its two separate factors."""

import dataclasses
import math

import pytest
import torch

from dsv2.config import ModelConfig, RopeConfig, YarnConfig
from dsv2.kernels.rope import rope as rotate
from dsv2.model import Transformer
from dsv2.model.mla import MLA
from dsv2.model.rope import inverse_frequencies, rotary_tables
from tests.numerics import BUDGETS, assert_close, rel_err

R = 64  # V2's rotary width
POSITIONS = torch.tensor([0, 1, 2, 17, 4095, 4096, 32000])


def yarn(**changes: float) -> RopeConfig:
    fields = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}
    return RopeConfig(yarn=YarnConfig(**(fields | changes)))  # type: ignore[arg-type]


def random_heads(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(POSITIONS), 3, R, generator=torch.Generator().manual_seed(seed))


def test_interleaved_rotation_is_complex_multiplication() -> None:
    x_THR = random_heads()
    angles = POSITIONS.double()[:, None] * inverse_frequencies(RopeConfig(), R).double()
    unit = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x_THR.double().unflatten(-1, (-1, 2))) * unit).flatten(-2)
    tables = angles.cos().float(), angles.sin().float()
    assert_close(rotate(x_THR, *tables, "interleaved"), expected)


def test_half_rotation_is_the_interleaved_one_on_permuted_channels() -> None:
    x_THR, tables = random_heads(), rotary_tables(RopeConfig(), R, POSITIONS)
    order = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2)))
    assert torch.equal(rotate(x_THR[..., order], *tables, "half"), rotate(x_THR, *tables, "interleaved")[..., order])


def test_half_rotation_of_interleaved_channels_is_wrong() -> None:
    x_THR, tables = random_heads(), rotary_tables(RopeConfig(), R, POSITIONS)
    assert rel_err(rotate(x_THR, *tables, "half"), rotate(x_THR, *tables, "interleaved")) > 0.1


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_the_distance_alone(layout: str) -> None:
    q, k = random_heads(0)[:1], random_heads(1)[:1]

    def score(i: int, j: int) -> torch.Tensor:
        at_i, at_j = (rotary_tables(RopeConfig(), R, torch.tensor([p])) for p in (i, j))
        return (rotate(q, *at_i, layout).double() * rotate(k, *at_j, layout).double()).sum(-1)

    assert_close(score(12, 5), score(107, 100))


def test_position_zero_is_not_rotated() -> None:
    x_THR = random_heads()
    tables = rotary_tables(RopeConfig(), R, torch.zeros(len(POSITIONS), dtype=torch.int64))
    assert torch.equal(rotate(x_THR, *tables, "interleaved"), x_THR)


def test_rotation_computes_in_fp32_and_keeps_the_dtype() -> None:
    x_THR, tables = random_heads().bfloat16(), rotary_tables(RopeConfig(), R, POSITIONS)
    assert torch.equal(rotate(x_THR, *tables, "interleaved"), rotate(x_THR.float(), *tables, "interleaved").bfloat16())


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match="layout='spiral' must be 'interleaved' or 'half'"):
        rotate(random_heads(), *rotary_tables(RopeConfig(), R, POSITIONS), "spiral")


# YaRN -------------------------------------------------------------------------------------------------------------


def test_plain_frequencies_are_powers_of_theta() -> None:
    expected = torch.tensor([10000.0 ** (-2 * i / R) for i in range(R // 2)], dtype=torch.float64)
    assert_close(inverse_frequencies(RopeConfig(), R), expected)


def test_yarn_of_v2_keeps_11_frequencies_and_divides_those_from_23_on_by_40() -> None:
    stretched = inverse_frequencies(yarn(), R).double() / inverse_frequencies(RopeConfig(), R).double()
    assert_close(stretched[:11], torch.ones(11))
    assert_close(stretched[23:], torch.full((9,), 1 / 40))
    ramp = torch.arange(1, 13, dtype=torch.float64) / 13  # low = 10, high = 23
    assert_close(stretched[11:23], (1 - ramp) + ramp / 40)


def test_yarn_without_a_stretch_changes_no_frequency() -> None:
    assert_close(inverse_frequencies(yarn(factor=1.0), R), inverse_frequencies(RopeConfig(), R))


def test_an_empty_ramp_is_a_step() -> None:
    # So short an original length that no channel turns once: low and high are both 0, and the width would be too.
    rope = yarn(original_max_position_embeddings=3)
    stretched = inverse_frequencies(rope, 4).double() / inverse_frequencies(RopeConfig(), 4).double()
    assert_close(stretched, torch.tensor([1.0, 1 / 40]))


@pytest.mark.parametrize(
    ("mscale", "scale"), [(0.707, 0.114721), (1.0, 0.135234), (None, 0.0721688)], ids=["v2", "v2.5", "4k"]
)
def test_softmax_scale_of_every_release(mscale: float | None, scale: float) -> None:
    rope = RopeConfig() if mscale is None else yarn(mscale=mscale, mscale_all_dim=mscale)
    cfg = ModelConfig.preset("v2").replace(num_layers=1, rope=rope)
    with torch.device("meta"):
        attention = Transformer(cfg).model.layers[0].self_attn
    assert isinstance(attention, MLA)
    assert attention.scale == pytest.approx(scale, rel=1e-5)


def test_rotary_ratio_is_one_in_every_release() -> None:
    assert [yarn(mscale=m, mscale_all_dim=m).rotary_ratio for m in (0.707, 1.0)] == [1.0, 1.0]


def test_rotary_ratio_and_softmax_factor_are_separate() -> None:
    rope = yarn(mscale=1.0, mscale_all_dim=0.707)
    assert rope.softmax_factor == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    assert rope.rotary_ratio == pytest.approx((0.1 * math.log(40) + 1) / (0.0707 * math.log(40) + 1))


def test_rotary_ratio_scales_cos_and_sin() -> None:
    scaled, plain = yarn(mscale=1.0, mscale_all_dim=0.707), yarn()
    for a, b in zip(rotary_tables(scaled, R, POSITIONS), rotary_tables(plain, R, POSITIONS), strict=True):
        assert rel_err(a, b * scaled.rotary_ratio) <= BUDGETS[torch.float32]


def test_without_mscales_the_ratio_is_yarns_own_and_the_softmax_is_left_alone() -> None:
    rope = RopeConfig(yarn=YarnConfig(factor=40.0, original_max_position_embeddings=4096))
    assert rope.rotary_ratio == pytest.approx(0.1 * math.log(40) + 1)
    assert rope.softmax_factor == 1.0


def test_an_explicit_attention_factor_replaces_the_ratio_and_not_the_softmax_factor() -> None:
    rope = yarn()
    assert rope.yarn is not None
    override = dataclasses.replace(rope, yarn=dataclasses.replace(rope.yarn, attention_factor=1.5))
    assert override.rotary_ratio == 1.5
    assert override.softmax_factor == rope.softmax_factor
