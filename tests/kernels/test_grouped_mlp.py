"""grouped_mlp and swiglu beyond parity: all paths agree, rows keep to themselves, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2.kernels.case import Maker
from dsv2.kernels.grouped_mlp import grouped_mlp, kernel, swiglu_mlp
from dsv2.kernels.grouped_mlp.cases import CASES
from dsv2.kernels.route import route
from dsv2.kernels.swiglu import swiglu, swiglu_packed
from tests.numerics import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(name: str = "few", changes: dict[str, Tensor] | None = None) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    return case.inputs(Maker.seeded(0, DEVICE)) | (changes or {})


def loop(x: Tensor, experts: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token after token, as equation 20 has it."""
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for e, gate in zip(experts[t].tolist(), gates[t], strict=True):
            g, u = (gate_up[e] @ x[t]).chunk(2)
            total = total + gate * (down[e] @ (torch.nn.functional.silu(g) * u))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["one-token", "unsorted", "few", "one-expert-takes-all", "many-rows-an-expert"])
def test_every_path_equals_a_loop_over_tokens(name) -> None:
    args = inputs(name)
    assert_close(kernel.grouped_mlp(**args), loop(**args))
    assert_close(grouped_mlp(**args), loop(**args))


def test_the_counts_of_the_router_change_nothing() -> None:
    args = inputs()
    T, D = args["x"].shape
    weight = torch.randn(8, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    _, experts, gates, counts = route(args["x"], weight, experts_per_token=2)
    args |= {"experts": experts, "gates": gates}
    with_counts = kernel.grouped_mlp(**args, block_counts=counts)
    assert torch.equal(with_counts, kernel.grouped_mlp(**args))


def test_a_token_of_nan_spoils_no_other() -> None:
    args = inputs()
    clean = kernel.grouped_mlp(**args)
    x = args["x"].clone()
    x[4] = float("nan")
    spoilt = kernel.grouped_mlp(**args | {"x": x})
    assert spoilt[4].isnan().all()
    others = torch.arange(len(x), device=DEVICE) != 4
    assert torch.equal(spoilt[others], clean[others])


def test_experts_may_be_a_view_of_something_wider() -> None:
    args = inputs("unsorted")
    wide = torch.cat((args["experts"], args["experts"]), 1)
    viewed = args | {"experts": wide[:, : args["experts"].shape[1]]}
    assert torch.equal(kernel.grouped_mlp(**viewed), kernel.grouped_mlp(**args))


def test_training_and_inference_agree() -> None:
    args = inputs("T63")
    trained = kernel.grouped_mlp(**args | {"x": args["x"].detach().requires_grad_()})
    assert_close(kernel.grouped_mlp(**args), trained.detach())


BAD = {
    "experts has shape .*, expected .9, any.": {"experts": torch.zeros(8, 2, dtype=torch.int64)},
    "experts is int32, expected int64": {"experts": torch.zeros(9, 2, dtype=torch.int32)},
    "gates has shape .*, expected .9, 2.": {"gates": torch.zeros(9, 3)},
    "gate_up has shape .*, expected .8, 80, 64.": {"gate_up": torch.zeros(8, 40, 64)},
    "gate_up is float64, expected float32": {"gate_up": torch.zeros(8, 80, 64).double()},
    "down has strides .*, expected contiguous": {"down": torch.zeros(8, 40, 64).transpose(1, 2)},
    "block_counts has shape .*, expected .1, 8.": {"block_counts": torch.zeros(2, 8, dtype=torch.int32)},
    "addend has shape .*, expected .9, 64.": {"addend": torch.zeros(9, 32)},
    "x has D=60 channels and down F=40: both must be multiples of 8, and not 0": {
        "x": torch.zeros(9, 60),
        "gate_up": torch.zeros(8, 80, 60),
        "down": torch.zeros(8, 60, 40),
    },
    "down is on meta, x on": {"down": torch.zeros(8, 64, 40, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_match_is_named_with_both_values(message) -> None:
    changes = {n: x if x.device.type == "meta" else x.to(DEVICE) for n, x in BAD[message].items()}
    with pytest.raises(ValueError, match=message):
        grouped_mlp(**inputs(changes=changes))


@pytest.mark.parametrize("run", [grouped_mlp, kernel.grouped_mlp], ids=["reference", "kernel"])
def test_an_addend_may_be_given_when_all_else_is_launched(run) -> None:
    args = inputs()
    addend = torch.ones_like(args["x"])
    assert torch.equal(run(**args, addend=lambda: addend), run(**args, addend=addend))


def test_the_operator_tells_the_compiler_the_truth() -> None:
    args = inputs()
    torch.library.opcheck(kernel._rows.op, (args["x"], args["experts"], args["gate_up"], args["down"], None, None))


def off_by_one(x: Tensor) -> Tensor:
    """The same numbers, one element past where they would begin."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_experts_that_the_copy_engine_cannot_read_are_refused(name: str) -> None:
    args = inputs()
    with pytest.raises(ValueError, match=rf"{name} begins 4 bytes past a multiple of 16, expected at one"):
        kernel.grouped_mlp(**args | {name: off_by_one(args[name])})


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_dense_layer_that_the_copy_engine_cannot_read_is_refused(name: str) -> None:
    args = {"gate": torch.zeros(24, 16), "up": torch.zeros(24, 16), "down": torch.zeros(16, 24)}
    args = {n: x.to(DEVICE) for n, x in args.items()}
    with pytest.raises(ValueError, match=rf"{name} begins 4 bytes past a multiple of 16, expected at one"):
        kernel.swiglu_mlp(torch.zeros(2, 16, device=DEVICE), **args | {name: off_by_one(args[name])})


def test_a_dense_layer_of_other_widths_is_refused() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"down has shape \(16, 8\), expected \(16, 24\)"):
        swiglu_mlp(x, torch.zeros(24, 16), torch.zeros(24, 16), torch.zeros(16, 8))


def test_swiglu_refuses_halves_that_differ() -> None:
    with pytest.raises(ValueError, match=r"up has shape \(2, 3\), expected \(2, 4\)"):
        swiglu(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 5\), expected an even number of columns"):
        swiglu_packed(torch.zeros(2, 5))
