"""`dsv2 bench latency` and `throughput`: what an engine delivers, under the names and in the shapes of vLLM's commands.

A batch of equal requests gives time to first token, prefill rate, time a step and decode rate, beside the least time
that a step's bytes take; many requests at once give tokens a second. Through `Engine` as its users drive it; HTTP is
measured by `dsv2 bench serve`.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import sys
import time
from collections import abc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table

from dsv2.bench.kernels import Machine, find_device, find_machine, head
from dsv2.config import EngineConfig, ModelConfig
from dsv2.config.counts import active_parameters_without_embedding, kv_elements_per_token
from dsv2.config.engine import PAGE_SIZE
from dsv2.config.schema import require
from dsv2.engine.core import Engine
from dsv2.engine.sampling import SamplingParams
from dsv2.files import write_json
from dsv2.model import Transformer
from dsv2.weights import load, parse_dtype, resolve

CPU_NOTE = (
    "No GPU: the reference implementations, by wall clock. This shows that the command works; it says nothing about "
    "a GPU."
)
MAX_NUM_SEQS = 512
"""Requests that `throughput` runs at once, at most."""

Row = dict[str, Any]
Job = abc.Callable[[Engine, Machine], Row]

# Headings, and a row's fields under them.
_COLUMNS = {
    "latency": {
        "batch": "{batch_size}",
        "prompt": "{input_len:,}",
        "output": "{output_len:,}",
        "latency s": "{latency_s:.3f}",
        "prefill tokens/s": "{prefill_tokens_per_s:,.0f}",
        "step ms": "{decode_step_ms:.2f}",
        "decode tokens/s": "{decode_tokens_per_s:,.0f}",
        "of roofline": "{roofline:.0%}",
    },
    "throughput": {
        "requests": "{num_prompts:,}",
        "prompt tokens": "{input_tokens:,}",
        "output tokens": "{output_tokens:,}",
        "seconds": "{elapsed_s:.2f}",
        "requests/s": "{requests_per_s:.2f}",
        "output tokens/s": "{output_tokens_per_s:,.0f}",
        "tokens/s": "{tokens_per_s:,.0f}",
    },
}


# Measures ---------------------------------------------------------------------------------------------------------


def random_model(cfg: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A model of normal weights of std 0.02 and gains 1, made where it is used: tokens spread over the experts."""
    with torch.device("meta"):
        model = Transformer(cfg.replace(initializer_std=0.02))
    model = model.to(dtype).to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(seed))
    return model.requires_grad_(False)


def decode_bytes(cfg: ModelConfig, num_sequences: int, context_length: float, itemsize: int) -> float:
    """Bytes that a decode step reads: weights, of the experts as many as are expected to be chosen, and the cache."""
    elements = num_sequences * context_length * kv_elements_per_token(cfg)
    if cfg.moe is None:
        return itemsize * (elements + active_parameters_without_embedding(cfg))
    moe = cfg.moe
    num_layers = sum(cfg.is_moe_layer(layer) for layer in range(cfg.num_layers))
    expert = 3 * cfg.hidden_size * moe.expert_intermediate_size
    is_missed = (1 - moe.experts_per_token / moe.num_experts) ** num_sequences
    distinct = moe.num_experts * (1 - is_missed)
    others = active_parameters_without_embedding(cfg) - num_layers * moe.experts_per_token * expert
    return itemsize * (elements + others + num_layers * distinct * expert)


def latency(
    engine: Engine, batch_size: int, input_len: int, output_len: int, *, num_iters: int = 3, bytes_per_s: float | None
) -> dict[str, Any]:
    """Medians over `num_iters` batches of random prompts, after one that is not counted.

    The decode rate is that of the steps in which all sequences decode: from the moment that the last of them has its
    first token until the first is finished. `roofline` is the least time of such a step's bytes at `bytes_per_s`, over
    the time it took. Raises ValueError where the cache has no room for a batch, which would be measured piece by piece.
    """
    num_pages = engine.scheduler.pool.num_pages
    # The scheduler keeps one for each running sequence back from those that come.
    needed = batch_size * (1 + -(-(input_len + output_len) // PAGE_SIZE))
    require(
        needed <= num_pages,
        f"a batch of {batch_size} with {input_len} + {output_len} tokens each needs {needed} pages, the cache has "
        f"{num_pages}: give smaller ones",
    )
    rng = random.Random(batch_size)
    runs = [_batch(engine, rng, batch_size, input_len, output_len) for _ in range(1 + num_iters)][1:]
    prefill_s, tokens_per_s, total_s = (statistics.median(times) for times in zip(*runs, strict=True))
    step_s = batch_size / tokens_per_s
    num_bytes = decode_bytes(engine.model.cfg, batch_size, input_len + output_len / 2, engine.model.dtype.itemsize)
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "latency_s": total_s,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": batch_size * input_len / prefill_s,
        "decode_step_ms": 1e3 * step_s,
        "decode_tokens_per_s": tokens_per_s,
        "decode_step_bytes": num_bytes,
        "roofline": None if bytes_per_s is None else num_bytes / bytes_per_s / step_s,
        "runs": [list(run) for run in runs],
    }


def _batch(
    engine: Engine, rng: random.Random, batch_size: int, input_len: int, output_len: int
) -> tuple[float, float, float]:
    """Seconds until all sequences had a token, tokens a second while all decoded, seconds altogether."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    prompts = [_prompt(engine, rng, input_len) for _ in range(batch_size)]
    began = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, params)
    started, marks, num_tokens, any_finished = set(), [], 0, False
    while engine.has_unfinished:
        deltas = engine.step()
        num_tokens += sum(len(delta.token_ids) for delta in deltas)
        started |= {delta.request_id for delta in deltas}
        any_finished = any_finished or any(delta.finish_reason for delta in deltas)
        if len(started) == batch_size and (not any_finished or not marks):
            marks.append((time.perf_counter() - began, num_tokens))
    total_s = time.perf_counter() - began
    (first_s, first), (last_s, last) = marks[0], marks[-1]
    return first_s, (last - first) / (last_s - first_s) if last > first else batch_size / first_s, total_s


def _prompt(engine: Engine, rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(engine.model.cfg.vocab_size) for _ in range(num_tokens)]


def throughput(
    engine: Engine, num_prompts: int, input_len: int, output_len: int, *, range_ratio: float = 0.0
) -> dict[str, Any]:
    """`num_prompts` random requests, all there from the start; lengths vary by `range_ratio` about the given ones."""
    rng = random.Random(num_prompts)
    requests, num_output = [], 0
    for _ in range(num_prompts):
        lengths = [max(1, round(n * rng.uniform(1 - range_ratio, 1 + range_ratio))) for n in (input_len, output_len)]
        params = SamplingParams(temperature=0, max_tokens=lengths[1], ignore_eos=True)
        requests.append((_prompt(engine, rng, lengths[0]), params))
    num_input = sum(len(prompt) for prompt, _ in requests)
    began = time.perf_counter()
    for request in requests:
        engine.add(*request)
    while engine.has_unfinished:
        num_output += sum(len(delta.token_ids) for delta in engine.step())
    elapsed_s = time.perf_counter() - began
    return {
        "num_prompts": num_prompts,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "elapsed_s": elapsed_s,
        "requests_per_s": num_prompts / elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "tokens_per_s": (num_input + num_output) / elapsed_s,
    }


def make_engine(model: Transformer, batch_sizes: abc.Iterable[int], max_model_len: int) -> Engine:
    """One that holds any of the batches at once, without finding prompts of earlier ones in its cache."""
    return Engine(
        model,
        None,
        EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max(batch_sizes),
            max_num_batched_tokens=max(16384, *batch_sizes),
            enable_prefix_caching=False,
        ),
    )


# Commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured, where, and what becomes of it."""

    path: str | None = None
    """A checkpoint's directory or hub id; None: random weights in the architecture of `preset`."""
    preset: str | None = None
    device: str = "cuda"
    dtype: str | None = None
    """None: a checkpoint's own; of random weights bfloat16 on a GPU and float32 on the CPU."""
    commit: str = "unknown"
    out: Path | None = None
    """Gets the JSON, anew after every row, so that an interrupted run keeps what it measured."""


def run_latency(
    setup: Setup, batch_sizes: abc.Sequence[int], input_len: int, output_len: int, num_iters: int, console: Console
) -> dict[str, Any]:
    """`dsv2 bench latency`: a row for each batch size. Returns what `setup.out` gets; ValueError for bad input."""

    def row(batch_size: int, engine: Engine, machine: Machine) -> Row:
        bytes_per_s = machine.ceilings.bytes_per_s if machine.ceilings else None
        return latency(engine, batch_size, input_len, output_len, num_iters=num_iters, bytes_per_s=bytes_per_s)

    require(bool(batch_sizes), "--batch-size is empty: give one or several, such as 1,32")
    require(min(batch_sizes) > 0, f"--batch-size {min(batch_sizes)} must be positive")
    jobs = {f"batch {n}": partial(row, n) for n in batch_sizes}
    return _run("latency", setup, jobs, max(batch_sizes), input_len + output_len, console)


def run_throughput(
    setup: Setup, num_prompts: int, input_len: int, output_len: int, range_ratio: float, console: Console
) -> dict[str, Any]:
    """`dsv2 bench throughput`: one row, the second of two runs, since the first compiles kernels and captures graphs.

    Returns what `setup.out` gets; ValueError for bad input.
    """

    def row(engine: Engine, _: Machine) -> Row:
        return [throughput(engine, num_prompts, input_len, output_len, range_ratio=range_ratio) for _ in range(2)][1]

    longest = sum(math.ceil(n * (1 + range_ratio)) for n in (input_len, output_len))
    jobs = {f"{num_prompts} requests": row}
    return _run("throughput", setup, jobs, min(num_prompts, MAX_NUM_SEQS), longest, console)


def _run(
    what: str, setup: Setup, jobs: abc.Mapping[str, Job], max_num_seqs: int, max_model_len: int, console: Console
) -> dict[str, Any]:
    require((setup.path is None) != (setup.preset is None), "give either a checkpoint or --preset NAME")
    where = find_device(setup.device)
    if setup.out is not None:
        setup.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext(),
        Progress(console=console, transient=True) as bar,
    ):
        task = bar.add_task("the card's ceilings, the model", total=len(jobs))
        torch.empty(0, device=where)  # the GPU's context, which is part of a start
        start_s = process_age_s()
        machine = find_machine(where)
        model = _model(setup, where)
        # A page more for each sequence, so that the scheduler lets the last of a batch in at once.
        engine, engine_s = _timed(where, lambda: make_engine(model, [max_num_seqs], max_model_len + PAGE_SIZE))
        _, first_s = _timed(where, lambda: _batch(engine, random.Random(0), 1, 1, 1))
        results = head(machine, setup.commit, what, CPU_NOTE) | {
            "model": setup.path or setup.preset,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_pages": engine.scheduler.pool.num_pages,
            "startup_s": None if start_s is None else start_s + engine_s,
            "first_request_s": first_s,
            "rows": [],
        }
        for label, job in jobs.items():
            bar.update(task, description=label)
            results["rows"].append(job(engine, machine))
            if setup.out is not None:
                write_json(setup.out, results)
            bar.advance(task)
    return results


def _model(setup: Setup, device: torch.device) -> Transformer:
    dtype = parse_dtype(setup.dtype)
    if setup.path is not None:
        return load(resolve(setup.path), device=device, dtype=dtype)
    cfg = ModelConfig.preset(setup.preset or "")
    return random_model(cfg, device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))


def _timed(device: torch.device, call: abc.Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds until the device has done what it asked for."""
    began = time.perf_counter()
    returned = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return returned, time.perf_counter() - began


def process_age_s() -> float | None:
    """Seconds since this process began, as Linux counts them; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    # Field 22 of proc(5), in ticks since boot; the name before field 3 may hold anything but ends with a bracket.
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def print_results(console: Console, results: abc.Mapping[str, Any]) -> None:
    """The rows as a table, as wide as it needs, without a roofline where the card's read rate is not known."""
    columns = dict(_COLUMNS[results["what"]])
    if results["ceilings"] is None:
        columns.pop("of roofline", None)
    about = [f"{results['model']} in {results['dtype']}", results["card"], f"torch {results['torch']}"]
    table = Table(title=", ".join([*about, f"commit {results['commit']}"]), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(*(form.format(**row) for form in columns.values()))
    table.width = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.print(table, crop=False, highlight=False)
    if results["startup_s"] is not None:
        console.print(
            f"ready {results['startup_s']:.1f} s after the process began, loading weights excluded; the first request "
            f"took {results['first_request_s']:.1f} s",
            highlight=False,
        )
    if results["note"]:
        console.print(results["note"], markup=False, highlight=False)
