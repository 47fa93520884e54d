"""What there is to measure: the benchmarks of the rooms under dsv2/kernels, found by walking the package."""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dsv2.kernels
from dsv2.bench import moe_layer
from dsv2.kernels.case import Benchmark, Case, Maker


@dataclass(frozen=True, slots=True)
class Job:
    """A benchmark of a room, with the function that it times and the one that is right."""

    room: str
    benchmark: Benchmark
    function: Callable[..., Any]
    reference: Callable[..., Any]

    @property
    def label(self) -> str:
        """room/benchmark, or room/function/benchmark where the function is not called as the room."""
        function = self.benchmark.function
        between = f"{function}/" if function not in ("", self.room) else ""
        return f"{self.room}/{between}{self.benchmark.name}"


def all_rooms() -> list[str]:
    """Of dsv2/kernels; and the MoE layer that several of them make."""
    return [*sorted(m.name for m in pkgutil.iter_modules(dsv2.kernels.__path__) if m.ispkg), "moe_layer"]


def find_jobs(rooms: Sequence[str], only: str, device: torch.device) -> list[Job]:
    """The benchmarks of `rooms` (none: all) whose label contains `only`; on the CPU test cases take their place.

    ValueError, with the nearest name, where there is no such room or benchmark.
    """
    known = all_rooms()
    for room in rooms:
        if room not in known:
            raise _unknown("room", room, known)
    jobs = [job for room in rooms or known for job in _jobs_of(room, device)]
    chosen = [job for job in jobs if only in job.label]
    if not chosen:
        raise _unknown("benchmark", only, list(dict.fromkeys(job.benchmark.name for job in jobs)))
    return chosen


def _jobs_of(room: str, device: torch.device) -> list[Job]:
    if room == "moe_layer":
        # It has no small inputs: nothing to try on the CPU.
        if device.type != "cuda":
            return []
        return [Job(room, b, moe_layer.moe_layer, moe_layer.moe_layer_reference) for b in moe_layer.BENCHMARKS]
    public, reference, cases = (
        importlib.import_module(f"dsv2.kernels.{room}{part}") for part in ("", ".reference", ".cases")
    )
    benchmarks = cases.BENCHMARKS
    if device.type != "cuda":
        benchmarks = [_small_benchmark(case) for case in cases.CASES if case.dtypes]
    jobs = []
    for b in benchmarks:
        name = b.function or room
        jobs.append(Job(room, b, getattr(public, name), getattr(reference, name)))
    return jobs


def _small_benchmark(case: Case) -> Benchmark:
    """A test case to be timed; nobody has counted its work."""
    return Benchmark(
        name=case.name,
        function=case.function,
        inputs=lambda device: case.inputs(Maker.seeded(0, device)),
        flops=math.nan,
        bytes=math.nan,
        gradients=case.gradients,
        backward=bool(case.gradients),
        mutated=case.mutated,
    )


def _unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    some = ", ".join([*known[:12], *(["..."] if known[12:] else [])])
    hint = f" (did you mean '{near[0]}'?)" if near else f"; there are: {some}"
    return ValueError(f"no {kind} '{name}'{hint}")
