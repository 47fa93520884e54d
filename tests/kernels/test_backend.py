"""Which implementation runs, and how a GPU that is too old is told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsv2.kernels import backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What `use_kernel` is asked about: something that lies on a CUDA device, here on a machine that may have none."""

    class OnTheGpu:
        device = torch.device("cuda", 0)

    backend.is_supported.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.delenv("DSV2_KERNELS", raising=False)
    yield OnTheGpu()
    backend.is_supported.cache_clear()


def test_the_cpu_runs_the_reference() -> None:
    assert not backend.use_kernel(torch.zeros(1))


@pytest.mark.parametrize("found", [(9, 0), (10, 0)])
def test_a_new_gpu_runs_the_kernels(gpu, monkeypatch, caplog, found) -> None:
    monkeypatch.setattr(backend, "capability", lambda device: found)
    assert backend.use_kernel(gpu)
    assert not caplog.records


def test_an_older_gpu_runs_the_reference_and_one_line_says_so(gpu, monkeypatch, caplog) -> None:
    monkeypatch.setattr(backend, "capability", lambda device: (8, 0))
    with caplog.at_level(logging.WARNING, "dsv2.kernels"):
        assert [backend.use_kernel(gpu) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "Old GPU has compute capability 8.0; dsv2's kernels need 9.0, so the reference implementations run"
    )


def test_the_environment_can_ask_for_the_reference(gpu, monkeypatch) -> None:
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    monkeypatch.setenv("DSV2_KERNELS", "reference")
    assert not backend.use_kernel(gpu)
    monkeypatch.setenv("DSV2_KERNELS", "triton")
    with pytest.raises(ValueError, match="DSV2_KERNELS='triton' must be 'auto' or 'reference'"):
        backend.use_kernel(gpu)
