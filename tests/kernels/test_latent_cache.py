"""write_latent beyond parity: bits shared with rms_norm and rope, padding, the edges of the cache, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv2.kernels import latent_cache as room
from dsv2.kernels.latent_cache import kernel, reference
from dsv2.kernels.rms_norm import kernel as rms_norm_kernel
from dsv2.kernels.rope import kernel as rope_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, R = 32, 8
BOTH = pytest.mark.parametrize("write", [kernel.write_latent, reference.write_latent], ids=["kernel", "reference"])
Write = Callable[..., None]


def draw(
    slots: list[int], P: int = 2, dtype: torch.dtype = torch.float32, device: str = DEVICE, **others: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    T = len(slots)
    angles = torch.randn(T, R // 2, generator=generator)
    inputs = {
        "kv": torch.randn(T, C + R, generator=generator).to(dtype),
        "weight": torch.randn(C, generator=generator).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "cache": torch.full((P, 64, C + R), float("nan"), dtype=dtype),
        "slots": torch.tensor(slots, dtype=torch.int64),
    }
    on_device = {n: x.to(device) for n, x in inputs.items()}
    return {**on_device, "eps": 1e-6, "layout": "interleaved", **others}


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_bits_equal_those_of_rms_norm_and_rope(layout: str) -> None:
    inputs = draw([70, 3, 127, 0, 64], dtype=torch.float16, layout=layout)
    kernel.write_latent(**inputs)
    kv, cache = inputs["kv"], inputs["cache"]
    c_kv = rms_norm_kernel.rms_norm(kv[:, :C], inputs["weight"], inputs["eps"])
    k_rope = rope_kernel.rope(kv[:, None, C:], inputs["cos"], inputs["sin"], layout)[:, 0]
    assert torch.equal(cache.view(-1, C + R)[inputs["slots"]], torch.cat((c_kv, k_rope), -1))


@BOTH
def test_slots_name_page_and_offset(write: Write) -> None:
    inputs = draw([2 * 64 + 5], P=3)
    write(**inputs)
    written = inputs["cache"].isfinite().all(-1)
    assert written.nonzero().tolist() == [[2, 5]]


@BOTH
def test_every_slot_of_a_cache_can_be_written(write: Write) -> None:
    inputs = draw(torch.randperm(128, generator=torch.Generator().manual_seed(2)).tolist())
    write(**inputs)
    assert inputs["cache"].isfinite().all()


@BOTH
@pytest.mark.parametrize("slots", [[-1, -1, -7], [-1], []], ids=str)
def test_padding_alone_leaves_every_bit_of_the_cache(write: Write, slots: list[int]) -> None:
    inputs = draw(slots)
    before = inputs["cache"].normal_(generator=torch.Generator(DEVICE).manual_seed(3)).clone()
    write(**inputs)
    assert torch.equal(inputs["cache"], before)


@BOTH
def test_padding_beside_slot_zero_does_not_reach_it(write: Write) -> None:
    """A negative slot is not the last one either, as it would be in an index of torch."""
    padded, plain = draw([-1, 0, -1, 127, -2]), draw([1, 0, 2, 127, 3])
    padded["kv"][[0, 2, 4]] = float("nan")
    write(**padded)
    write(**plain)
    for offset in (0, 127):
        assert torch.equal(padded["cache"].view(128, -1)[offset], plain["cache"].view(128, -1)[offset])
    assert padded["cache"].isfinite().all(-1).sum() == 2


def test_a_slot_beyond_the_cache_is_an_error_in_the_reference() -> None:
    with pytest.raises(IndexError):
        reference.write_latent(**draw([128], device="cpu"))


def test_a_slot_beyond_the_cache_does_not_reach_what_lies_there() -> None:
    inputs = draw([128, 5], P=3)
    memory = inputs["cache"]
    kernel.write_latent(**inputs | {"cache": memory[:2]})
    assert memory.isfinite().all(-1).nonzero().tolist() == [[0, 5]]


def test_nothing_is_differentiated() -> None:
    inputs = draw([1, 2], device="cpu")
    inputs["kv"].requires_grad_()
    inputs["weight"].requires_grad_()
    room.write_latent(**inputs)
    assert not inputs["cache"].requires_grad


def test_the_bits_of_a_row_do_not_depend_on_its_batch() -> None:
    whole, alone = draw(list(range(9))), draw([4], P=2)
    kernel.write_latent(**whole)
    alone |= {n: whole[n][4:5] for n in ("kv", "cos", "sin", "slots")} | {"weight": whole["weight"]}
    kernel.write_latent(**alone)
    assert torch.equal(alone["cache"][0, 4], whole["cache"][0, 4])


def test_the_operator_tells_the_compiler_the_truth() -> None:
    names = ("kv", "weight", "eps", "cos", "sin", "layout", "cache", "slots")
    inputs = draw([3, -1, 64])
    inputs["cache"].zero_()
    torch.library.opcheck(kernel._write_latent.op, (*(inputs[n] for n in names), torch.zeros(3, 2, 8)))


def test_queries_with_channels_apart_are_refused() -> None:
    inputs = draw([1, 2], device="cpu")
    q_rope = torch.zeros(2, 3, 2 * inputs["cos"].shape[1] * 2)[..., ::2]
    with pytest.raises(ValueError, match="q_rope has strides"):
        room.write_latent(**inputs, q_rope=q_rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": torch.zeros(2, 32, C + R)}, r"cache has shape \(2, 32, 40\), expected \(any, 64, 40\)"),
        ({"cache": torch.zeros(2, 64, 39)}, r"cache has shape \(2, 64, 39\), expected \(any, 64, 40\)"),
        ({"cache": torch.zeros(2, 64, C + R, dtype=torch.float16)}, "cache is float16, expected float32"),
        ({"cache": torch.zeros(2, 64, 80)[..., :40]}, r"cache has strides \(5120, 80, 1\)"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"slots has shape \(3,\), expected \(2\)"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots is int32, expected int64"),
        ({"weight": torch.zeros(40)}, "kv has 0 rotary channels, expected pairs"),
        ({"weight": torch.zeros(31)}, "kv has 9 rotary channels, expected pairs"),
        ({"weight": torch.zeros(32, dtype=torch.float16)}, "weight is float16, expected float32"),
        ({"kv": torch.zeros(2, 4, 10)}, r"kv has shape \(2, 4, 10\), expected \(any, any\)"),
        ({"cos": torch.zeros(2, 8)}, r"cos has shape \(2, 8\), expected \(2, 4\)"),
        ({"layout": "pairs"}, "layout='pairs' must be"),
    ],
)
def test_arguments_that_do_not_match_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        room.write_latent(**draw([1, 2], device="cpu") | changes)
