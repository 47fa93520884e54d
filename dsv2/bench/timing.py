"""How long one call takes, and what the card can do at best.

On a GPU: replays of a CUDA graph of several calls, so that the host does not set the pace. On the CPU: wall clock.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

REPLAYS = 30
REPLAY_US = 2000.0
"""What one replay should take: long beside the launch of a graph, short beside a person's patience."""

READ_BYTES = 2 * 1024**3
MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """Median, 10th and 90th percentile over REPLAYS replays, each the mean of `calls` calls.

    `graph` is False where the calls were not replayed from a CUDA graph, so that the time includes waits for the host.
    """

    us: float
    p10_us: float
    p90_us: float
    calls: int
    graph: bool


Clock = Callable[[Call], Timing]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The card's measured rates: reading memory, and multiplying bf16 matrices."""

    bytes_per_s: float
    flops_per_s: float

    def time_us(self, flops: float, num_bytes: float) -> float:
        """Least time of work that overlaps its arithmetic with its memory traffic perfectly."""
        return 1e6 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def wall_clock(call: Call, now: Callable[[], float] = time.perf_counter) -> Timing:
    """Time on the CPU, after one warm-up; `now` gives seconds."""
    call()
    times_us = []
    for _ in range(REPLAYS):
        began = now()
        call()
        times_us.append(1e6 * (now() - began))
    return _summary(times_us, calls=1, graph=False)


def gpu_clock(call: Call) -> Timing:
    """Time on the current GPU from a CUDA graph, or from eager calls where the call cannot be captured."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call()
        shortest_us = max(min(_event_times_us(call, 5)), 1.0)
        num_calls = min(max(math.ceil(REPLAY_US / shortest_us), 2), 100)

        def calls() -> None:
            for _ in range(num_calls):
                call()

        graph = None if _synchronises(call) else _capture(calls)
        times_us = _event_times_us(calls if graph is None else graph.replay, REPLAYS)
        torch.cuda.synchronize()
    return _summary([t / num_calls for t in times_us], calls=num_calls, graph=graph is not None)


def measure_ceilings(device: torch.device) -> Ceilings:
    """By a sum over 2 GiB and a bf16 product of 8192 x 8192 matrices; random numbers, since zeros run faster."""
    x = torch.randn(READ_BYTES // 4, device=device)
    read = gpu_clock(x.sum)
    del x
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = gpu_clock(lambda: a @ b)
    return Ceilings(1e6 * READ_BYTES / read.us, 1e6 * 2 * MATMUL_SIZE**3 / product.us)


def _summary(times_us: list[float], *, calls: int, graph: bool) -> Timing:
    deciles = statistics.quantiles(times_us, n=10, method="inclusive")
    return Timing(statistics.median(times_us), deciles[0], deciles[-1], calls, graph)


def _event_times_us(run: Call, repeats: int) -> list[float]:
    """All runs are enqueued before any is awaited, so that the GPU always has work behind the current one."""
    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _synchronises(call: Call) -> bool:
    """Whether the call makes the host wait for the GPU, which no graph can hold.

    Found out beforehand because a capture that breaks off leaves torch 2.11's allocator unfit for further captures.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _capture(calls: Call) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            calls()
    except RuntimeError:
        return None
    return graph
