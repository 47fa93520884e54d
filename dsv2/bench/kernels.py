"""`dsv2 bench kernels`: parity first, then the time of every benchmark and of its baselines, into one JSON.

On the CPU there are no kernels to time: the rooms' small test inputs go through the reference implementations, by wall
clock, and the results say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dsv2.bench.jobs import Job, find_jobs
from dsv2.bench.parity import check_parity, cotangents, leaves_of, tensors
from dsv2.bench.timing import Call, Ceilings, Clock, Timing, gpu_clock, measure_ceilings, wall_clock
from dsv2.device import pick_device
from dsv2.files import write_json
from dsv2.kernels.backend import use_kernel
from dsv2.kernels.case import Benchmark

CPU_NOTE = (
    "No GPU: the reference implementations on the rooms' small test inputs, by wall clock. This shows that the "
    "command works; it says nothing about the kernels."
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where jobs run, how they are timed there, and what limits them (None: not known)."""

    device: torch.device
    clock: Clock
    wide: torch.dtype
    ceilings: Ceilings | None = None
    l2_bytes: int = 0


def run(
    rooms: Sequence[str] = (),
    *,
    only: str = "",
    device: str = "cuda",
    commit: str = "unknown",
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the benchmarks of `rooms` (none: all) whose label contains `only`.

    `out` gets the JSON, anew after every benchmark, so that an interrupted run keeps what it measured. Raises
    ValueError for unknown names, and where there is no GPU and `device` is not `cpu`.
    """
    where = find_device(device)
    jobs = find_jobs(rooms, only, where)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with (
        torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext(),
        Progress(console=console, transient=True) as bar,
    ):
        task = bar.add_task("the card's ceilings", total=len(jobs))
        machine = find_machine(where)
        results = head(machine, commit) | {"rows": []}
        for job in jobs:
            bar.update(task, description=job.label)
            results["rows"].append(run_job(job, machine))
            if out is not None:
                write_json(out, results)
            bar.advance(task)
    return results


def find_device(name: str) -> torch.device:
    """A GPU or the CPU. ValueError where it is not there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device for --device {name}: --device cpu tries the command on the references instead"
        )
    return pick_device(name)


def find_machine(device: torch.device) -> Machine:
    """Measures the ceilings of a GPU, which takes a second."""
    if device.type != "cuda":
        return Machine(device, wall_clock, torch.float64)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return Machine(device, gpu_clock, torch.float32, measure_ceilings(device), l2_bytes)


# One benchmark ----------------------------------------------------------------------------------------------------


def run_job(job: Job, machine: Machine) -> Row:
    """A row of the results. What fails is a row that says so: it must not cost the other benchmarks their figures."""
    row: Row = {"room": job.room, "function": job.benchmark.function or job.room, "benchmark": job.label}
    try:
        return row | _measure(job, machine)
    except Exception as error:
        return row | {"failed": _one_line(error)}


def _measure(job: Job, machine: Machine) -> Row:
    b = job.benchmark
    torch.manual_seed(0)
    inputs = b.inputs(machine.device)
    parity = check_parity(b, inputs, job.function, job.reference, machine.wide)
    num_bytes = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    row: Row = {
        "backward": b.backward,
        "parity": parity.verdict,
        "errors": {what: error if math.isfinite(error) else None for what, error in parity.errors.items()},
        "input_bytes": num_bytes,
        "fits_l2": num_bytes < machine.l2_bytes,
    }
    if parity.verdict == "WRONG":
        return row
    timing = machine.clock(call_of(b, inputs, job.function))
    baselines = {name: _baseline(b, inputs, call, machine, timing) for name, call in b.baselines.items()}
    return row | dataclasses.asdict(timing) | _speed(b, timing, machine.ceilings) | {"baselines": baselines}


def call_of(benchmark: Benchmark, inputs: Mapping[str, Any], function: Callable[..., Any]) -> Call:
    """What is timed: the forward pass alone, or the forward pass and `torch.autograd.grad` of all its outputs."""
    leaves = leaves_of(benchmark, inputs)
    arguments = {**inputs, **leaves}

    def forward() -> None:
        with torch.no_grad():
            function(**arguments)

    def roots() -> list[Tensor]:
        return [x for x in tensors(function(**arguments)) if x.requires_grad]

    def forward_and_backward() -> None:
        torch.autograd.grad(roots(), list(leaves.values()), dy)

    if not leaves:
        return forward
    dy = cotangents(roots())
    return forward_and_backward


def _baseline(b: Benchmark, inputs: Mapping[str, Any], call: Callable[..., Any], machine: Machine, ours: Timing) -> Row:
    try:
        timing = machine.clock(call_of(b, inputs, call))
    except Exception as error:  # another library's limits are no fault of ours
        return {"failed": _one_line(error)}
    return dataclasses.asdict(timing) | {"speedup": timing.us / ours.us}


def _speed(b: Benchmark, timing: Timing, ceilings: Ceilings | None) -> Row:
    """Rates and how near they come to the ceilings; nothing where the ceilings are not known."""
    if ceilings is None:
        return {}
    ceiling_us = ceilings.time_us(b.flops, b.bytes)
    return {
        "tflops": b.flops / timing.us / 1e6,
        "gb_per_s": b.bytes / timing.us / 1e3,
        "ceiling_us": ceiling_us,
        "percent_of_ceiling": 100 * ceiling_us / timing.us,
        "target_us": b.target_us,
        "meets_target": None if b.target_us is None else timing.us <= b.target_us,
    }


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# All of them ------------------------------------------------------------------------------------------------------


def head(machine: Machine, commit: str, what: str = "kernels", cpu_note: str = CPU_NOTE) -> dict[str, Any]:
    """What the rows of `dsv2 bench WHAT` were measured on and with; on the CPU the note comes along."""
    gpu = machine.device.type == "cuda"
    c = machine.ceilings
    return {
        "what": what,
        "card": torch.cuda.get_device_name(machine.device) if gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "implementation": "kernel" if use_kernel(torch.empty(0, device=machine.device)) else "reference",
        "note": "" if gpu else cpu_note,
        "ceilings": c and {"read_gb_per_s": c.bytes_per_s / 1e9, "bf16_matmul_tflops": c.flops_per_s / 1e12},
        "l2_bytes": machine.l2_bytes,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_sound(results: Mapping[str, Any]) -> bool:
    """Whether no row is WRONG or failed."""
    return not any("failed" in row or row["parity"] == "WRONG" for row in results["rows"])
