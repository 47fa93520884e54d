"""Every public function of every room refuses numbers that are not floating-point, on the CPU as on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from dsv2.kernels.case import Case
from tests.kernels.rooms import cases, inputs_of

FLOATING: dict[tuple[str, str, str], Case] = {
    (room, case.function or room, argument): case
    for room, case in cases()
    if case.dtypes  # the others are large: drawing them takes minutes
    for argument, x in inputs_of(case, "cpu", torch.float32).items()
    if isinstance(x, Tensor) and x.is_floating_point()
}


@pytest.mark.parametrize(("room", "function", "argument"), FLOATING)
def test_integers_in_place_of_floating_point_numbers_are_refused(room: str, function: str, argument: str) -> None:
    inputs = inputs_of(FLOATING[room, function, argument], "cpu", torch.float32)
    inputs[argument] = torch.zeros_like(inputs[argument], dtype=torch.int32)
    with pytest.raises(ValueError, match="int32"):
        getattr(importlib.import_module(f"dsv2.kernels.{room}"), function)(**inputs)
