"""Which implementation runs, and how a GPU that is too old is told."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dsv2.kernels import backend
from tests.kernels.rooms import ROOMS, part


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


# The current device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "expected"), [(1, ["set cuda:1", "run", "leave"]), (0, ["run"])])
def test_an_operator_runs_on_the_device_of_its_tensors_and_sets_it_only_where_it_is_another(
    monkeypatch: pytest.MonkeyPatch, index: int, expected: list[str]
) -> None:
    happened: list[str] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        happened.append(f"set {device}")
        yield
        happened.append("leave")

    class OnTheGpu:
        device = torch.device("cuda", index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", guard)
    run = backend.on_its_device(lambda x, *others: happened.append("run") or others)
    assert run(OnTheGpu(), 1, 2) == (1, 2)
    assert happened == expected


def test_on_the_cpu_no_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    assert backend.on_its_device(lambda x: x + 1)(torch.zeros(1)) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_every_operator_of_every_room_is_one_of_these(room: str) -> None:
    file = part(room, "kernel").__file__
    assert ".custom_op" not in Path(file).read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_keeps_a_tensor_between_calls(room: str) -> None:
    """First made while a CUDA graph is captured, it would be the graph's, and hold nothing before a replay."""
    cached = [f for f in vars(part(room, "kernel")).values() if hasattr(f, "cache_info")]
    assert not [f.__name__ for f in cached if "Tensor" in str(inspect.signature(f).return_annotation)]


def test_an_operator_is_its_body_in_inference_mode_unless_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice, through_torch = backend.kernel_op("dsv2_tests::twice")(body), []
    twice.register_fake(torch.empty_like)
    op = twice.op
    monkeypatch.setattr(twice, "op", lambda x: through_torch.append(x) or op(x))
    with torch.inference_mode():
        assert twice(torch.ones(2)).tolist() == [2, 2]
        assert not through_torch
        with FakeTensorMode() as mode:
            twice(mode.from_tensor(torch.ones(2)))
    assert len(through_torch) == 1
    assert twice(torch.ones(2)).tolist() == [2, 2]
    assert len(through_torch) == 2
