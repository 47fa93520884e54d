"""Kernels run interpreted where there is no GPU, and every output starts as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton decorates a kernel, so before any room's `kernel` is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN (integers: of an absurd number), so that unwritten outputs show."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "meta":
            return x
        return x.fill_(float("nan") if x.is_floating_point() else 2_147_480_000 if x.dtype != torch.bool else True)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    yield
